"""Opening a checkpoint or an export as a model for generation."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from mtp_dist.checkpoint.find import find_valid_checkpoint
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.config import Config
from mtp_dist.convert.exported import exported_weights
from mtp_dist.convert.llama import LAYER, llama_weights, split
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.tokenizer import ByteTokenizer, Tokenizer
from mtp_dist.errors import CheckpointError
from mtp_dist.inference.configuration import generation_model_config
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.packing import can_pack, pack_linear_layers


def open_model(folder: Path, **options: Any) -> tuple[MTPForCausalLM, Tokenizer, Config]:
    """Return the model of an export or a checkpoint, its tokenizer and the configuration of the run that trained it.

    Of a folder of checkpoints the newest is opened. On a CPU the model is for inference only: its weights are packed.

    options: those of transformers' `from_pretrained`, such as `dtype` and `device_map`. Raise CheckpointError if the
    folder has neither, ConfigError or DataError if its tokenizer cannot be used.
    """
    config, weights, tokenizer = _read(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"--model = '{folder}' has a vocabulary of {config.vocab_size} tokens, its tokenizer one of "
            f"{tokenizer.vocab_size}: it belongs to another model"
        )
    end = tokenizer.end_of_document
    dtype = config.train.precision
    model: MTPForCausalLM = MTPForCausalLM.from_pretrained(
        None,
        config=generation_model_config(config, end, dtype),
        state_dict=dict(model_weights(config, weights)),
        **options,
    )
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.eval()  # type: ignore[no-untyped-call]
    if not options.get("device_map") and can_pack(model.lm_head.weight):
        pack_linear_layers(model)
    return model, tokenizer, config


def _read(folder: Path) -> tuple[Config, Iterable[tuple[str, Tensor]], Tokenizer]:
    """Return the configuration, the weights by global name and the tokenizer."""
    if (folder / HEADS_CONFIG).exists():
        config, weights = exported_weights(folder)
        bytes_name = config.data.tokenizer == ByteTokenizer.name
        return config, weights, build_tokenizer(ByteTokenizer.name if bytes_name else str(folder), "--model")
    checkpoint = find_valid_checkpoint(folder) if folder.is_dir() else None
    if checkpoint is None:
        raise CheckpointError(
            f"--model = '{folder}' is neither a checkpoint nor an export of mtp-dist: give a folder such as "
            "step_00000010, or one that mtp-dist export wrote"
        )
    config, tensors = load_weights(checkpoint)
    return config, tensors.items(), build_tokenizer(config.data.tokenizer)


def model_weights(config: Config, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of an MTPForCausalLM, made of the full weights by global name."""
    in_llama = llama_weights(config)
    linear = config.heads.kind == "linear"
    for name, weight in weights:
        if name == "token_order.weight":
            continue
        parts = in_llama.get(name) or _draft_names(name)
        if linear:
            replaced = {
                "model.norm.weight": "model.norm.norm.weight",
                "draft_blocks.1.linear.weight": "model.norm.linear.weight",
            }
            parts = tuple(replaced.get(part, part) for part in parts)
        yield from zip(parts, split(name, weight, config.model), strict=True)


def _draft_names(name: str) -> tuple[str, ...]:
    """Return the names in an MTPForCausalLM that a weight of heads 2..n has, one for each of its parts."""
    group, key, rest = name.split(".", 2)
    if group == "unembeddings":
        return (f"draft_unembeddings.{key}.{rest}",)
    depth, _, weight = rest.removeprefix("layers.").partition(".")
    if weight in LAYER:
        return tuple(f"draft_blocks.{key}.layers.{depth}.{part}" for part in LAYER[weight])
    return (f"draft_blocks.{key}.{rest}",)
