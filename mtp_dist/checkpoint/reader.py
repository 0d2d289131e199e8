"""Reading the tensors of a checkpoint, without DeepSpeed, Megatron-core or the engine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_dist.checkpoint.format import MANIFEST, MODEL, InvalidCheckpointError, index_file, read_metadata
from mtp_dist.checkpoint.manifest import ProgressCallback, check_weights, read_manifest
from mtp_dist.config import Config


class WeightReader(Protocol):
    """The weights of a model by global name, read in blocks."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight."""

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        """Return a block of a weight, fp32 on the CPU. Raise CheckpointError if its file is missing or corrupt."""


class TensorReader:
    """The tensors of one kind in a checkpoint, read one by one."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Raise CheckpointError if the index is missing or corrupt, or names a file that the manifest lacks."""
        self.folder = folder
        self._open: dict[str, Any] = {}
        records = read_manifest(folder)
        with self._errors_explained():
            index: dict[str, Any] = json.loads((folder / index_file(kind)).read_text(encoding="utf-8"))
            self.weight_map: dict[str, str] = dict(index["weight_map"])
            unknown = sorted(set(self.weight_map.values()) - records.keys())
        if unknown:
            raise InvalidCheckpointError(folder, f"{index_file(kind)} names {unknown[0]!r}, which is not in {MANIFEST}")

    def read(self, name: str) -> Tensor:
        """Return a full tensor, fp32 on the CPU. Raise CheckpointError if its file is missing or corrupt."""
        # Opened for this tensor only: what was read of an open file stays in memory.
        with self._errors_explained(), safe_open(self.folder / self.weight_map[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        """Return a block of a tensor, fp32 on the CPU. Its file stays open for further blocks.

        Raise CheckpointError if the file is missing or corrupt.
        """
        path = self.weight_map[name]
        with self._errors_explained():
            if path not in self._open:
                self._open[path] = safe_open(self.folder / path, "pt")
            values: Tensor = self._open[path].get_slice(name)[block]
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor from the files' headers. Raise CheckpointError if one is corrupt."""
        found: dict[str, tuple[int, ...]] = {}
        for path in dict.fromkeys(self.weight_map.values()):
            with self._errors_explained(), safe_open(self.folder / path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return {name: found[name] for name in self.weight_map}

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidCheckpointError(self.folder, f"{error.filename or error} cannot be read") from None
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise InvalidCheckpointError(self.folder, error) from None


def load_weights(
    folder: Path, on_progress: ProgressCallback = lambda done, total: None
) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration and the full fp32 weights by global name.

    Raise CheckpointError if the folder is not a valid checkpoint. `on_progress` follows the verification of its
    weights.
    """
    check_weights(folder, on_progress)
    metadata, reader = read_metadata(folder), TensorReader(folder, MODEL)
    return metadata.config, {name: reader.read(name) for name in reader.weight_map}
