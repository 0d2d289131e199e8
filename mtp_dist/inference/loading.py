"""Opening a checkpoint or an export as a model for generation."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from mtp_dist.checkpoint.find import find_valid_checkpoint
from mtp_dist.checkpoint.format import MANIFEST, METADATA_FILE, MODEL, InvalidCheckpointError, read_metadata
from mtp_dist.checkpoint.manifest import ProgressCallback
from mtp_dist.checkpoint.reader import TensorReader
from mtp_dist.config import Config
from mtp_dist.convert.exported import exported_weights
from mtp_dist.convert.llama import LAYER, llama_weights, split
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.convert.to_huggingface import DTYPES
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.tokenizer import ByteTokenizer, Tokenizer
from mtp_dist.errors import CheckpointError, ConfigError
from mtp_dist.inference.configuration import generation_model_config
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.packing import can_pack, pack_linear_layers
from mtp_dist.model.parameters import parameter_shapes


class _Folder(NamedTuple):
    """What a folder contains."""

    config: Config
    tokenizer: Tokenizer
    weights: Iterator[tuple[str, Tensor]]
    """Full weights by global name, read one by one."""
    dtype: torch.dtype


def open_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    on_verified: ProgressCallback = lambda done, total: None,
    **options: Any,
) -> tuple[MTPForCausalLM, Tokenizer, Config]:
    """Return the model of an export or a checkpoint, its tokenizer and the configuration of the run that trained it.

    In a run's folder or one of several checkpoints the newest valid one is opened. dtype: by default that of an
    export's files, or `train.precision`. `on_verified` follows the verification of a checkpoint's weights in bytes.
    options: those of transformers' `from_pretrained`, such as `device_map`; without it the model is on the CPU, packed,
    which means for inference only. Raise CheckpointError if the folder has no model or a corrupt one, ConfigError or
    DataError if its tokenizer cannot be used.
    """
    read = _open_export(folder) if (folder / HEADS_CONFIG).exists() else _open_checkpoint(folder, on_verified)
    config, tokenizer = read.config, read.tokenizer
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"--model = '{folder}' has a vocabulary of {config.vocab_size} tokens, its tokenizer one of "
            f"{tokenizer.vocab_size}: it belongs to another model, put back the one that this model was trained with"
        )
    end, dtype = tokenizer.end_of_document, dtype or read.dtype
    weights = model_weights(config, _finite(read.weights, folder))
    model: MTPForCausalLM
    report: dict[str, set[str]]
    with _silent_loading():
        model, report = MTPForCausalLM.from_pretrained(  # type: ignore[misc]
            None,
            config=generation_model_config(config, end, config.train.precision),
            state_dict={name: weight.to(dtype) for name, weight in weights},
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    if wrong := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise CheckpointError(f"--model = '{folder}' has other weights than its configuration requires: {wrong[0]}")
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.eval()  # type: ignore[no-untyped-call]
    if not options.get("device_map") and can_pack(model.lm_head.weight):
        pack_linear_layers(model)
    return model, tokenizer, config


def _open_export(folder: Path) -> _Folder:
    config, weights = exported_weights(folder)
    bytes_name = config.data.tokenizer == ByteTokenizer.name
    tokenizer = build_tokenizer(ByteTokenizer.name if bytes_name else str(folder), "--model")
    first = next(weights)
    return _Folder(config, tokenizer, chain([first], weights), first[1].dtype)


def _open_checkpoint(folder: Path, on_verified: ProgressCallback) -> _Folder:
    if (folder / METADATA_FILE).exists() and not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"--model = '{folder}' has no {MANIFEST}: it is an incomplete checkpoint, or a model of Hugging Face, "
            "which mtp-dist import converts"
        )
    try:
        checkpoint = find_valid_checkpoint(folder, on_verified) if folder.is_dir() else None
    except CheckpointError as error:
        raise CheckpointError(f"--model = '{folder}' cannot be opened: {error}") from None
    if checkpoint is None:
        raise CheckpointError(
            f"--model = '{folder}' is neither a checkpoint nor an export of mtp-dist: give a folder such as "
            "step_00000010, or one that mtp-dist export wrote"
        )
    config = read_metadata(checkpoint).config
    try:
        tokenizer = build_tokenizer(config.data.tokenizer)
    except ConfigError as error:
        raise ConfigError(
            f"--model = '{folder}' was trained with a tokenizer that is not here: {error}. Put it back (a relative "
            "path begins in the current folder), or give an export, which contains its tokenizer"
        ) from None
    return _Folder(config, tokenizer, _checkpoint_weights(checkpoint, config), DTYPES[config.train.precision])


def _checkpoint_weights(checkpoint: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    reader = TensorReader(checkpoint, MODEL)
    found = reader.shapes()
    for name, shape in parameter_shapes(config).items():
        if found.get(name) != shape:
            problem = f"{name} is {found.get(name, 'missing')}, its configuration requires {shape}"
            raise InvalidCheckpointError(checkpoint, problem)
        yield name, reader.read(name)


def _finite(weights: Iterable[tuple[str, Tensor]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights. Raise CheckpointError at one with NaN or infinity, from which no text can be generated."""
    for name, weight in weights:
        if not weight.sum(dtype=torch.float32).isfinite():
            raise CheckpointError(
                f"--model = '{folder}' has NaN or infinity in {name}: its training has diverged, give an earlier "
                "checkpoint"
            )
        yield name, weight


@contextmanager
def _silent_loading() -> Iterator[None]:
    """Silence transformers' progress bar, and its report of missing weights, which is an error here."""
    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


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
