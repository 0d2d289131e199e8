"""The weights of an exported folder under their global names, and the check of a new export."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.convert.fold import ReadWeight
from mtp_dist.convert.head_layout import model_weights, part_shapes
from mtp_dist.convert.plain_weights import fuse, fused_rows, plain_weights, split
from mtp_dist.convert.saved_heads import HEADS, HEADS_CONFIG, SavedHeads
from mtp_dist.convert.weight_folder import WeightFolder
from mtp_dist.errors import CheckpointError
from mtp_dist.model.parameters import parameter_shapes


class ExportedWeights:
    """The weights of an export of mtp-dist by global name, read one by one or in blocks."""

    def __init__(self, folder: Path, option: str = "--model") -> None:
        """Raise CheckpointError if the folder is not an export, lacks a weight or is corrupt.

        option: the one that names the folder, for messages.
        """
        self._saved = SavedHeads(folder, option)
        if self._saved.config is None:
            raise CheckpointError(f"{option} = '{folder}' is not an export of mtp-dist: it has no {HEADS_CONFIG}")
        self.config, self._model = self._saved.config, WeightFolder(folder, option)
        self._in_plain, self._shapes = plain_weights(self.config), parameter_shapes(self.config)
        parts = part_shapes(self.config, self._in_plain.items())
        self._model.check_shapes(parts)
        self._saved.check_shapes({name: shape for name, shape in self._shapes.items() if name not in self._in_plain})
        in_model = parts.keys() | self._saved.model_parts
        self.unknown = sorted(self._model.shapes.keys() - in_model | self._saved.names - self._shapes.keys())
        """Names of tensors that the export's configuration has no place for."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """Return a full weight in the precision of the files. Raise CheckpointError if its data is corrupt."""
        if name not in self._in_plain:
            return self._saved.read(name, self._shapes[name])
        return fuse(name, [self._model.read(part) for part in self._in_plain[name]], self.config.model)

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        """Return a block of a weight, fp32 on the CPU. Raise CheckpointError if its data is corrupt."""
        if name not in self._in_plain:
            return self._saved.read_block(name, block).float()
        rows, *columns = block
        parts = fused_rows(name, rows.start, rows.stop, self.config.model)
        in_plain = self._in_plain[name]
        return torch.cat([self._model.read_block(in_plain[part], (piece, *columns)) for part, piece in parts]).float()


def exported_weights(folder: Path, option: str = "--model") -> tuple[Config, Iterator[tuple[str, Tensor]]]:
    """Return the configuration of an export and an iterator over all full weights by global name.

    The weights have the precision of the files and are read one by one. See ExportedWeights.
    """
    weights = ExportedWeights(folder, option)
    return weights.config, ((name, weights.read(name)) for name in weights.shapes())


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
