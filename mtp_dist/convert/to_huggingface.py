"""Export: trunk and head 1 as a Llama that any program opens, the other heads in a file next to it."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_dist.checkpoint.find import find_valid_checkpoint
from mtp_dist.checkpoint.format import MODEL, read_metadata
from mtp_dist.checkpoint.manifest import ProgressCallback
from mtp_dist.checkpoint.reader import TensorReader
from mtp_dist.checkpoint.writer import new_folder, report_progress, write_tensors, write_weights
from mtp_dist.config import Config, config_to_save
from mtp_dist.convert.card import model_card
from mtp_dist.convert.llama import llama_layers, llama_shapes, llama_weights, split
from mtp_dist.convert.rope import rope_to_llama
from mtp_dist.convert.saved_heads import HEADS, HEADS_CONFIG
from mtp_dist.convert.tokenizer_files import write_tokenizer
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.errors import CheckpointError, ConfigError
from mtp_dist.model.parameters import parameter_shapes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """A Hugging Face folder that was written."""

    folder: str
    step: int
    dtype: str
    layers: int
    """Number of the Llama's layers."""
    parameters: int
    """Number of the Llama's parameters."""
    head_weights: list[str]
    """Global names of the weights in mtp_heads.safetensors."""

    def describe(self) -> str:
        others = f", {len(self.head_weights)} more weights in {HEADS}" if self.head_weights else ""
        return (
            f"{self.folder}: step {self.step} as a Llama of {self.layers} layers and {self.parameters / 1e6:.2f} M "
            f"parameters in {self.dtype}{others}"
        )


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    dtype: str | None,
    on_progress: ProgressCallback = lambda done, total: None,
    on_verified: ProgressCallback = lambda done, total: None,
) -> Exported:
    """Write the checkpoint, or the newest of a folder of them, as a new Hugging Face folder `target`.

    dtype: that of the training if None. `on_verified` follows the verification of the weights' files in bytes,
    `on_progress` counts the weights written. Raise CheckpointError if there is no checkpoint, if no Llama computes its
    head 1, or if the folder exists or cannot be written.
    """
    if dtype and dtype not in DTYPES:
        raise ConfigError(f"--dtype = '{dtype}' is not one of {', '.join(DTYPES)}")
    source = find_valid_checkpoint(checkpoint, on_verified)
    if source is None:
        raise CheckpointError(f"--checkpoint = '{checkpoint}' has no checkpoint: give a folder such as step_00000010")
    metadata, reader = read_metadata(source), TensorReader(source, MODEL)
    config = metadata.config
    if not config.heads.traits.exportable:
        raise CheckpointError(
            f"{source} has heads.kind = '{config.heads.kind}': its head 1 multiplies the trunk's output by a matrix "
            "before the final norm, where a Llama has none; models with heads of the other kinds can be exported"
        )
    dtype = dtype or config.train.precision
    shapes, target_shapes, in_llama = parameter_shapes(config), llama_shapes(config), llama_weights(config)
    others = {name: shape for name, shape in shapes.items() if name not in in_llama}

    def converted(name: str) -> Tensor:
        return reader.read(name).to(DTYPES[dtype])

    def all_tensors() -> Iterator[Tensor]:
        for name in in_llama:
            yield from split(name, converted(name), config.model)
        yield from map(converted, others)

    with new_folder(target) as folder:
        end = build_tokenizer(config.data.tokenizer).end_of_document
        # Before the tokenizer: AutoTokenizer opens it by config.json.
        _write_json(folder / "config.json", llama_config(config, end, dtype))
        end_token, _ = write_tokenizer(config.data.tokenizer, folder)
        _write_json(folder / "generation_config.json", dict.fromkeys(GENERATION_TOKEN_KEYS, end))
        tensors = report_progress(all_tensors(), len(target_shapes) + len(others), on_progress)
        write_weights(folder, target_shapes, DTYPES[dtype], tensors)
        if others:
            write_tensors(folder / HEADS, others, DTYPES[dtype], tensors)
        saved = {"step": metadata.step, "vocab_size": config.vocab_size, **config_to_save(config)}
        _write_json(folder / HEADS_CONFIG, saved)
        card = model_card(target.name, source, metadata, dtype, end_token, list(others))
        (folder / "README.md").write_text(card, encoding="utf-8")
    parameters = sum(map(math.prod, target_shapes.values()))
    return Exported(str(target), metadata.step, dtype, len(llama_layers(config)), parameters, list(others))


GENERATION_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def llama_config(config: Config, end_of_document: int, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`, for transformers of any version."""
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": len(llama_layers(config)),
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.train.sequence_length,
        "rms_norm_eps": model.norm_eps,
        **rope_to_llama(model),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": model.init_std,
        # Documents follow one another in training, so the token that ends one precedes the next.
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
