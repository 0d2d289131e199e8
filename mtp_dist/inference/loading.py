"""Reading a checkpoint or an export for generation."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_dist.checkpoint.find import find_named_checkpoint
from mtp_dist.checkpoint.format import InvalidCheckpointError
from mtp_dist.checkpoint.manifest import ProgressCallback, check_weights
from mtp_dist.checkpoint.merged import MergedWeights
from mtp_dist.config import Config
from mtp_dist.convert.architectures.base import Architecture
from mtp_dist.convert.architectures.llama import LLAMA
from mtp_dist.convert.architectures.registry import architecture_of
from mtp_dist.convert.exported import exported_weights
from mtp_dist.convert.plain_weights import plain_weights, split
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.convert.to_huggingface import DTYPES
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.tokenizer import ByteTokenizer, Tokenizer
from mtp_dist.errors import CheckpointError, ConfigError
from mtp_dist.model.parameters import STATE_WEIGHTS, parameter_shapes


class ModelFolder(NamedTuple):
    """The contents of a checkpoint or an export."""

    path: Path
    config: Config
    """Configuration of the run that trained the model, without its low-rank adapters, which are merged."""
    tokenizer: Tokenizer
    weights: Iterator[tuple[str, Tensor]]
    """Weights by global name, or by that in an MTPForCausalLM, read one by one."""
    dtype: torch.dtype
    """That of an export's files, or `train.precision`."""


def read_folder(folder: Path, on_verified: ProgressCallback = lambda done, total: None) -> ModelFolder:
    """Read an export or a checkpoint, with the arguments and errors of `read_full_weights`."""
    read = read_full_weights(folder, on_verified)
    return read._replace(weights=model_weights(read.config, read.weights))


def read_full_weights(folder: Path, on_verified: ProgressCallback = lambda done, total: None) -> ModelFolder:
    """Read an export or a checkpoint: in a run's folder or one of several checkpoints the newest valid one.

    The weights have their global names. `on_verified` follows the verification of a checkpoint's weights in bytes.
    Raise CheckpointError if the folder has no model or a corrupt one, ConfigError or DataError if its tokenizer cannot
    be used.
    """
    is_export = (folder / HEADS_CONFIG).exists()
    read = _open_export(folder) if is_export else _open_checkpoint(folder, on_verified)
    if read.tokenizer.vocab_size > read.config.vocab_size:
        raise CheckpointError(
            f"--model = '{folder}' has a vocabulary of {read.config.vocab_size} tokens, its tokenizer one of "
            f"{read.tokenizer.vocab_size}: it belongs to another model, put back the one that this model was trained "
            "with"
        )
    return read._replace(weights=_finite(read.weights, f"--model = '{folder}'", is_export))


def _open_export(folder: Path) -> ModelFolder:
    config, weights = exported_weights(folder)
    bytes_name = config.data.tokenizer == ByteTokenizer.name
    tokenizer = build_tokenizer(ByteTokenizer.name if bytes_name else str(folder), "--model")
    first = next(weights)
    return ModelFolder(folder, config, tokenizer, chain([first], weights), first[1].dtype)


def _open_checkpoint(folder: Path, on_verified: ProgressCallback) -> ModelFolder:
    checkpoint = find_named_checkpoint(folder, f"--model = '{folder}'", lambda found: check_weights(found, on_verified))
    weights = MergedWeights(checkpoint)
    config = weights.config
    try:
        tokenizer = build_tokenizer(config.data.tokenizer)
    except ConfigError as error:
        raise ConfigError(
            f"--model = '{folder}' was trained with a tokenizer that is not here: {error}. Put it back (a relative "
            "path begins in the current folder), or give an export, which contains its tokenizer"
        ) from None
    return ModelFolder(
        folder, config, tokenizer, _checkpoint_weights(checkpoint, weights), DTYPES[config.train.precision]
    )


def _checkpoint_weights(checkpoint: Path, weights: MergedWeights) -> Iterator[tuple[str, Tensor]]:
    found = weights.shapes()
    for name, shape in parameter_shapes(weights.config).items():
        if found.get(name) != shape:
            problem = f"{name} is {found.get(name, 'missing')}, its configuration requires {shape}"
            raise InvalidCheckpointError(checkpoint, problem)
        yield name, weights.read(name)


def _finite(weights: Iterable[tuple[str, Tensor]], label: str, is_export: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights. Raise CheckpointError at one with NaN or infinity, from which no text can be generated."""
    cause = "its training has diverged, give an earlier checkpoint"
    if is_export:  # which has no checksums
        cause = "the file is damaged or the training has diverged, export this or an earlier checkpoint again"
    for name, weight in weights:
        if not weight.sum(dtype=torch.float32).isfinite():
            raise CheckpointError(f"{label} has NaN or infinity in {name}: {cause}")
        yield name, weight


def model_weights(config: Config, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of an MTPForCausalLM, made of the full weights by global name."""
    in_plain, architecture = plain_weights(config), architecture_of(config.model)
    norm = LLAMA.final_norm
    renamed = {  # an MTPForCausalLM has the names of a Llama, except in its layers
        architecture.embedding: LLAMA.embedding,
        f"{architecture.layers}.": f"{LLAMA.layers}.",
        f"{architecture.final_norm}.": f"{norm}.norm." if config.heads.kind == "linear" else f"{norm}.",
        architecture.unembedding: LLAMA.unembedding,
        "draft_blocks.1.linear.": f"{norm}.linear.",
    }
    for name, weight in weights:
        if name == "token_order.weight":
            continue
        parts = in_plain.get(name) or _draft_names(name, architecture)
        for name_there, name_here in renamed.items():
            parts = tuple(part.replace(name_there, name_here) for part in parts)
        yield from zip(parts, split(name, weight, config.model), strict=True)


def _draft_names(name: str, architecture: Architecture) -> tuple[str, ...]:
    """Return the names in an MTPForCausalLM that a weight of heads 2..n has, one for each of its parts."""
    if name == STATE_WEIGHTS:
        return (name,)
    group, key, rest = name.split(".", 2)
    if group in ("unembeddings", "condition"):
        return (f"draft_{group}.{key}.{rest}",)
    depth, _, weight = rest.removeprefix("layers.").partition(".")
    if architecture.has_part(weight):
        return architecture.layer_parts(int(depth), weight, f"draft_blocks.{key}.layers")
    return (f"draft_blocks.{key}.{rest}",)
