"""The weights of an exported folder under their global names, and the check of a new export."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.convert.fold import ReadWeight
from mtp_dist.convert.head_layout import model_weights, part_shapes
from mtp_dist.convert.llama import fuse, llama_weights, split
from mtp_dist.convert.saved_heads import HEADS, HEADS_CONFIG, SavedHeads
from mtp_dist.convert.weight_folder import WeightFolder
from mtp_dist.errors import CheckpointError
from mtp_dist.model.parameters import parameter_shapes


def exported_weights(folder: Path, option: str = "--model") -> tuple[Config, Iterator[tuple[str, Tensor]]]:
    """Return the configuration of an export and an iterator over all full weights by global name.

    The weights have the precision of the files and are read one by one. option: the one that names the folder, for
    messages. Raise CheckpointError if the folder is not an export of mtp-dist, lacks a weight or is corrupt; the
    iterator raises it if a file's data is.
    """
    saved = SavedHeads(folder, option)
    if saved.config is None:
        raise CheckpointError(f"{option} = '{folder}' is not an export of mtp-dist: it has no {HEADS_CONFIG}")
    config, llama = saved.config, WeightFolder(folder, option)
    in_llama, shapes = llama_weights(config), parameter_shapes(config)
    llama.check_shapes(part_shapes(config, llama_weights(config).items()))
    if missing := [name for name in shapes if name not in in_llama and name not in saved.names]:
        raise CheckpointError(f"{option} = '{folder}' is incomplete: {missing[0]} is not in {HEADS}")

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            if name in in_llama:
                yield name, fuse(name, [llama.read(part) for part in in_llama[name]], config.model)
            else:
                yield name, saved.read(name, shape)

    return config, weights()


def check_export(folder: Path, config: Config, architecture: str, expected: ReadWeight) -> None:
    """Read a new export again. Raise CheckpointError if a weight is missing or is not bitwise the expected one.

    expected: returns a full weight by global name, in the precision of the export.
    """
    model, weights = WeightFolder(folder, "--to"), model_weights(config, architecture)
    for name, parts in weights:
        for part, wanted in zip(parts, split(name, expected(name), config.model), strict=True):
            if part not in model.shapes or not _is_bitwise_equal(model.read(part), wanted):
                raise CheckpointError(f"nothing was exported: {part} would not be {name} of the checkpoint")
    others, in_model = SavedHeads(folder, "--to"), dict(weights)
    for name, shape in parameter_shapes(config).items():
        if name not in in_model and not (
            name in others.names and _is_bitwise_equal(others.read(name, shape), expected(name))
        ):
            raise CheckpointError(f"nothing was exported: {name} in {HEADS} would not be that of the checkpoint")


def _is_bitwise_equal(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have one shape, type and content; a NaN equals itself."""
    is_alike = (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    return is_alike and torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
