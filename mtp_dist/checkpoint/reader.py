"""Reading the tensors of a checkpoint, without the engine that trains."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_dist.checkpoint.format import MANIFEST, MODEL, index_file, read_metadata
from mtp_dist.checkpoint.manifest import DamagedCheckpointError, ProgressCallback, check_weights, read_manifest
from mtp_dist.config import Config
from mtp_dist.errors import ConfigError


class TensorReader:
    """The tensors of one kind in a checkpoint, read one by one."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Raise ConfigError if the index is missing or damaged, or names a file that the manifest does not have."""
        self.folder = folder
        self._open: dict[str, Any] = {}
        records = read_manifest(folder)
        with self._errors_explained():
            index: dict[str, Any] = json.loads((folder / index_file(kind)).read_text(encoding="utf-8"))
            self.weight_map: dict[str, str] = dict(index["weight_map"])
            unknown = sorted(set(self.weight_map.values()) - records.keys())
        if unknown:
            raise DamagedCheckpointError(
                folder, f"{index_file(kind)} names {unknown[0]!r}, which {MANIFEST} does not have"
            )

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, fp32 on the CPU. Raise ConfigError if its file is missing or damaged."""
        # Opened for this tensor only: what was read of an open file stays in memory.
        with self._errors_explained(), safe_open(self.folder / self.weight_map[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        """Return a block of a tensor, fp32 on the CPU. Its file stays open for the blocks to come.

        Raise ConfigError if the file is missing or damaged.
        """
        home = self.weight_map[name]
        with self._errors_explained():
            if home not in self._open:
                self._open[home] = safe_open(self.folder / home, "pt")
            values: Tensor = self._open[home].get_slice(name)[block]
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return those of all tensors, without reading them. Raise ConfigError if a file is missing or damaged."""
        found: dict[str, tuple[int, ...]] = {}
        for home in dict.fromkeys(self.weight_map.values()):
            with self._errors_explained(), safe_open(self.folder / home, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return {name: found[name] for name in self.weight_map}

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.folder} is not a whole checkpoint: {error.filename or error} cannot be read"
            ) from None
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{self.folder} is not a checkpoint of ours, or a damaged one: {error}") from None


def load_weights(folder: Path, watch: ProgressCallback = lambda done, total: None) -> tuple[Config, dict[str, Tensor]]:
    """Return the configuration and the full fp32 weights by global name.

    Raise ConfigError if there are none, or others than were saved. `watch` follows the verification of their files.
    """
    check_weights(folder, watch)
    description, reader = read_metadata(folder), TensorReader(folder, MODEL)
    return description.config, {name: reader.read(name) for name in reader.weight_map}
