"""Export: trunk and head 1 as a model that any program opens, and the other heads for programs that draft."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_dist.checkpoint.find import find_valid_checkpoint
from mtp_dist.checkpoint.manifest import ProgressCallback
from mtp_dist.checkpoint.merged import MergedWeights
from mtp_dist.checkpoint.writer import new_folder, report_progress, write_tensors, write_weights
from mtp_dist.config import Config, config_to_save
from mtp_dist.convert.architectures.registry import ARCHITECTURES, architecture_of
from mtp_dist.convert.card import model_card
from mtp_dist.convert.exported import check_export
from mtp_dist.convert.fold import ReadWeight, fold_final_norm
from mtp_dist.convert.head_layout import (
    LINEAR,
    MTP,
    model_type,
    model_weights,
    part_shapes,
    plain_name,
    transformers_architecture,
)
from mtp_dist.convert.peft_adapter import write_adapter
from mtp_dist.convert.plain_weights import plain_layers, plain_weights, split
from mtp_dist.convert.saved_heads import HEADS, HEADS_CONFIG
from mtp_dist.convert.tokenizer_files import GENERATION_CONFIG, generation_settings, write_tokenizer
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.errors import CheckpointError, ConfigError
from mtp_dist.model.parameters import parameter_shapes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ENGINES = ("plain", "transformers")
"""Programs that an export is for: those that open a plain model, or transformers, which drafts with other heads."""


@dataclass(frozen=True)
class Exported:
    """A Hugging Face folder that was written."""

    folder: str
    title: str
    """Name of the plain model's architecture."""
    step: int
    dtype: str
    layers: int
    """Number of the plain model's layers."""
    parameters: int
    """Number of the plain model's parameters."""
    head_weights: list[str]
    """Global names of the weights in mtp_heads.safetensors."""
    drafts_with: str | None = None
    """The call that drafts with the other heads, if the folder is opened with trust_remote_code=True."""
    adapter: str | None = None
    """Folder with the low-rank adapters alone, if it was written too."""

    def describe(self) -> str:
        others = f", {len(self.head_weights)} more weights in {HEADS}" if self.head_weights else ""
        lines = [
            f"{self.folder}: step {self.step} as a {self.title} of {self.layers} layers and "
            f"{self.parameters / 1e6:.2f} M parameters in {self.dtype}{others}"
        ]
        if self.drafts_with:
            lines.append(f"Opened with trust_remote_code=True, model.{self.drafts_with} drafts with the other heads")
        if self.adapter:
            lines.append(f"{self.adapter}: the low-rank adapters alone, for peft")
        return "\n".join(lines)


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    dtype: str | None,
    on_progress: ProgressCallback = lambda done, total: None,
    on_verified: ProgressCallback = lambda done, total: None,
    engine: str = "plain",
    adapter: Path | None = None,
) -> Exported:
    """Write the checkpoint, or the newest of a folder of them, as a new Hugging Face folder `target`.

    Low-rank adapters are merged, and also written as a new folder `adapter` for peft if one is given.

    dtype: that of the training if None. `on_verified` follows the verification of the weights' files in bytes,
    `on_progress` counts the weights written. Raise CheckpointError if there is no checkpoint, if it has a weight that
    an export has no place for, if no model of the engine computes its head 1, if there are no adapters to write, if a
    folder exists or cannot be written, or if it does not contain the checkpoint's weights when it is read again.
    """
    weights = _open_source(checkpoint, dtype, engine, adapter, on_verified)
    metadata, low_rank = weights.metadata, weights.metadata.config.train.low_rank
    plain = architecture_of(weights.config.model)
    architecture = plain.name if engine == "plain" else transformers_architecture(weights.config)
    config, read = (
        fold_final_norm(weights.config, weights.read) if architecture == MTP else (weights.config, weights.read)
    )
    dtype = dtype or config.train.precision
    with new_folder(target) as folder:
        others = _write_weights(folder, config, read, architecture, DTYPES[dtype], on_progress)
        end = build_tokenizer(config.data.tokenizer).end_of_document
        # Before the tokenizer: AutoTokenizer opens it by config.json, and asks about one that names code.
        _write_json(folder / "config.json", plain_config(config, end, dtype))
        end_token, _ = write_tokenizer(config.data.tokenizer, folder)
        _write_json(folder / "config.json", model_config(config, end, dtype, architecture))
        _write_json(folder / GENERATION_CONFIG, generation_settings(config.data.tokenizer, end))
        saved = {"step": metadata.step, "vocab_size": config.vocab_size, **config_to_save(config)}
        _write_json(folder / HEADS_CONFIG, saved)
        drafts_with = _copy_code(folder, config, architecture) if engine == "transformers" else None
        card = model_card(target.name, weights.folder, metadata, dtype, end_token, others, architecture, drafts_with)
        (folder / "README.md").write_text(card, encoding="utf-8")
        check_export(folder, config, architecture, lambda name: read(name).to(DTYPES[dtype]))
        if adapter and low_rank:
            with new_folder(adapter, "--adapter") as adapter_folder:
                write_adapter(adapter_folder, weights, low_rank)
    shapes = part_shapes(config, plain_weights(config).items())
    parameters = sum(map(math.prod, shapes.values()))
    return Exported(
        folder=str(target),
        title=plain.title,
        step=metadata.step,
        dtype=dtype,
        layers=len(plain_layers(config)),
        parameters=parameters,
        head_weights=others,
        drafts_with=drafts_with,
        adapter=str(adapter) if adapter else None,
    )


def _open_source(
    checkpoint: Path, dtype: str | None, engine: str, adapter: Path | None, on_verified: ProgressCallback
) -> MergedWeights:
    """Return the weights to export. Raise what `export_checkpoint` raises before it writes."""
    if dtype and dtype not in DTYPES:
        raise ConfigError(f"--dtype = '{dtype}' is not one of {', '.join(DTYPES)}")
    if engine not in ENGINES:
        raise ConfigError(f"--for = '{engine}' is not one of {', '.join(ENGINES)}")
    source = find_valid_checkpoint(checkpoint, on_verified)
    if source is None:
        raise CheckpointError(
            f"--checkpoint = '{checkpoint}' has no checkpoint: give a run's folder, or a checkpoint such as "
            "step_00000010"
        )
    weights = MergedWeights(source)
    heads = weights.config.heads
    if engine == "plain" and not heads.traits.exportable:
        raise CheckpointError(
            f"{source} has heads.kind = '{heads.kind}': its head 1 multiplies the trunk's output by a matrix "
            f"before the final norm, where a {architecture_of(weights.config.model).title} has none: export it with "
            "--for transformers"
        )
    if unknown := sorted(weights.shapes().keys() - parameter_shapes(weights.config).keys()):
        raise CheckpointError(f"{source} has the weight {unknown[0]}, which an export has no place for")
    if adapter and weights.metadata.config.train.low_rank is None:
        raise CheckpointError(f"{source} has no low-rank adapters (train.low_rank): leave out --adapter")
    return weights


def _write_weights(
    folder: Path,
    config: Config,
    read: ReadWeight,
    architecture: str,
    dtype: torch.dtype,
    on_progress: ProgressCallback,
) -> list[str]:
    """Write the model's files and those of the other heads. Return the global names of the weights in the latter."""
    weights = model_weights(config, architecture)
    in_model = dict(weights)
    shapes = part_shapes(config, weights)
    others = {name: shape for name, shape in parameter_shapes(config).items() if name not in in_model}

    def all_tensors() -> Iterator[Tensor]:
        for name, _ in weights:
            yield from split(name, read(name).to(dtype), config.model)
        for name in others:
            yield read(name).to(dtype)

    tensors = report_progress(all_tensors(), len(shapes) + len(others), on_progress)
    write_weights(folder, shapes, dtype, tensors)
    if others:
        write_tensors(folder / HEADS, others, dtype, tensors)
    return list(others)


REMOTE = Path(__file__).parent / "remote"
AUTO_CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
"""The end of a class's name, by the class of transformers that opens it."""


def model_config(config: Config, end_of_document: int, dtype: str, architecture: str) -> dict[str, Any]:
    """Return the content of config.json."""
    keys, modeling = plain_config(config, end_of_document, dtype), _modeling(architecture)
    if modeling is None:
        return keys
    if architecture.startswith(LINEAR):  # whose rope_parameters transformers would replace by the older keys
        keys = {key: value for key, value in keys.items() if key not in ("rope_theta", "rope_scaling")}
    prefix = f"{modeling}.{architecture.removesuffix('ForCausalLM')}"
    keys |= {
        "architectures": [architecture],
        "model_type": model_type(architecture),
        "auto_map": {auto_class: prefix + end for auto_class, end in AUTO_CLASSES.items()},
    }
    return keys | ({"num_mtp_layers": config.heads.count - 1} if architecture == MTP else {})


def _modeling(architecture: str) -> str | None:
    """Return the name of the file with the classes of an architecture, or None if transformers has them."""
    if architecture == MTP:
        return "modeling_mtp_llama"
    return f"modeling_{model_type(architecture)}" if architecture.startswith(LINEAR) else None


def _copy_code(folder: Path, config: Config, architecture: str) -> str | None:
    """Copy the code that transformers runs. Return the call that drafts with the other heads."""
    if modeling := _modeling(architecture):
        # The file is that for a Llama, with the names of the architecture.
        plain = ARCHITECTURES[plain_name(architecture)]
        source = REMOTE / f"{modeling.replace(plain.model_type, 'llama')}.py"
        code = source.read_text(encoding="utf-8").replace("llama", plain.model_type)
        code = code.replace("Llama", plain.name.removesuffix("ForCausalLM"))
        (folder / f"{modeling}.py").write_text(code, encoding="utf-8")
    if architecture == MTP:
        return "generate(..., use_mtp=True)"
    if config.heads.count == 1:
        return None
    (folder / "custom_generate").mkdir()
    for name in ("generate.py", "requirements.txt"):
        shutil.copyfile(REMOTE / name, folder / "custom_generate" / name)
    return "generate(...)"


def plain_config(config: Config, end_of_document: int, dtype: str) -> dict[str, Any]:
    """Return the content of config.json of the plain model, for transformers of any version."""
    model, architecture = config.model, architecture_of(config.model)
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": len(plain_layers(config)),
        "num_attention_heads": model.num_attention_heads,
        "max_position_embeddings": config.train.sequence_length,
        **architecture.config_json(model),
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        # Documents follow one another in training, so the token that ends one precedes the next.
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
