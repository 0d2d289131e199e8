"""The heads that an export of mtp_dist contains in addition to its plain model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_dist.config import Config, HeadsConfig, saved_config
from mtp_dist.config.heads import weight_differences
from mtp_dist.convert.head_layout import head_weights, part_shapes
from mtp_dist.convert.json_file import read_json_object
from mtp_dist.convert.plain_weights import fuse, fused_rows, plain_weights
from mtp_dist.convert.weight_folder import WeightFolder
from mtp_dist.errors import CheckpointError, ConfigError, UserError

HEADS, HEADS_CONFIG = "mtp_heads.safetensors", "mtp_config.json"


class SavedHeads:
    """Configuration and head weights of an exported folder; empty if mtp_dist has not exported it."""

    config: Config | None = None
    names: frozenset[str] = frozenset()
    model_parts: frozenset[str] = frozenset()
    """Names of the weights in the model's files that the plain model does not have."""

    def __init__(self, source: Path, option: str = "--from") -> None:
        """Raise CheckpointError if its files are corrupt. option: the one that names the folder."""
        self.source, self.label, self.file = source, f"{option} = '{source}'", source / HEADS
        self._in_model: dict[str, tuple[str, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        read = HEADS_CONFIG
        try:
            if (source / HEADS_CONFIG).exists():
                self.config = saved_config(json.loads((source / HEADS_CONFIG).read_text(encoding="utf-8")))
            read = HEADS
            if self.config and self.file.exists():
                with safe_open(self.file, "pt") as file:
                    self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                    self.names = frozenset(self._shapes)
        except UserError as error:
            raise CheckpointError(f"{self.label} cannot be opened: {HEADS_CONFIG}: {error}") from None
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"{self.label} is a corrupt export: {read}: {error}") from None
        if self.config:
            self._find_in_model(self.config, option)

    def _find_in_model(self, config: Config, option: str) -> None:
        """Find the weights of heads in the model's files. Raise CheckpointError if copies of one weight differ."""
        [architecture, *_] = read_json_object(self.source / "config.json", self.label).get("architectures") or [""]
        if not (weights := list(head_weights(config, architecture))):
            return
        self.model, shapes = WeightFolder(self.source, option), part_shapes(config, weights)
        self.model.check_shapes(shapes)
        self.model_parts, in_plain = frozenset(shapes), plain_weights(config)
        for name, parts in weights:
            first = in_plain.get(name) or self._in_model.setdefault(name, parts)
            for part, other in zip(first, parts, strict=True):
                if part != other and not torch.equal(self.model.read(part), self.model.read(other)):
                    raise CheckpointError(
                        f"{self.label} has different weights in {part} and {other}, which an export has as copies of "
                        f"{name}: the folder was changed since"
                    )
        self.names |= self._in_model.keys()

    def check_fits(self, heads: HeadsConfig) -> None:
        """Raise ConfigError if these are not heads of that kind."""
        if self.config is None or not self.names:
            return
        for key, saved, wanted in weight_differences(self.config.heads, heads, self.config.model.hidden_size):
            raise ConfigError(
                f"heads.{key} is {wanted!r}, the heads in {self.file} have {saved!r}: keep it, or delete this file "
                "to start with new heads"
            )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a weight as it is stored. Raise CheckpointError if its file is corrupt, or it has another shape."""
        if name in self._in_model and self.config:
            tensor = fuse(name, [self.model.read(part) for part in self._in_model[name]], self.config.model)
        else:
            tensor = self.read_block(name, (slice(None),))
        if tensor.shape != shape:
            raise self._shape_error(name, tensor.shape, shape)
        return tensor

    def check_shapes(self, needed: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError if a weight is missing or has another shape."""
        if missing := [name for name in needed if name not in self.names]:
            raise CheckpointError(f"{self.label} is incomplete: {missing[0]} is not in {HEADS}")
        for name, shape in needed.items():
            if self._shapes.get(name, shape) != shape:
                raise self._shape_error(name, self._shapes[name], shape)

    def _shape_error(self, name: str, found: Sequence[int], needed: Sequence[int]) -> CheckpointError:
        return CheckpointError(f"{self.label} has {name} as {list(found)}, its configuration requires {list(needed)}")

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        """Return a block of a weight as it is stored. Raise CheckpointError if its file is corrupt."""
        if name in self._in_model and self.config:
            rows, *columns = block
            parts = fused_rows(name, rows.start, rows.stop, self.config.model)
            in_model = self._in_model[name]
            return torch.cat([self.model.read_block(in_model[part], (piece, *columns)) for part, piece in parts])
        try:
            with safe_open(self.file, "pt") as file:
                tensor: Tensor = file.get_slice(name)[block]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}") from None
        return tensor
