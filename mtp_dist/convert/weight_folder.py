"""Reading the weights of a Hugging Face folder one by one. No code from it runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_dist.convert.json_file import read_json_object
from mtp_dist.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class WeightFolder:
    """A folder of safetensors files. Its weights are those that transformers would read."""

    def __init__(self, path: Path, option: str = "--from", renamed: Mapping[str, str] | None = None) -> None:
        """Raise CheckpointError if it has none, or if a file is corrupt.

        option: the one that names the folder. renamed: new names of weights by their names in the files.
        """
        self.path, self.label = path, f"{option} = '{path}'"
        self._renamed, self._names = renamed or {}, dict[str, str]()
        self.files = self._weight_files()
        self.weight_map: dict[str, str] = {}
        self.shapes: dict[str, list[int]] = {}
        self._opened: dict[str, Any] = {}
        self._read_headers()

    def _weight_files(self) -> list[str]:
        """Return the files that transformers reads: the single file, or else all files that an index names."""
        if (self.path / SINGLE).exists():
            return [SINGLE]
        if (self.path / INDEX).exists():
            return self._indexed_files()
        if pickles := sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern)):
            raise CheckpointError(
                f"{self.label} has its weights as a pickle, {pickles[0]}, which can run any code when it is "
                "opened: save the model as safetensors first"
            )
        raise CheckpointError(f"{self.label} has no weights: {SINGLE} is missing")

    def _indexed_files(self) -> list[str]:
        weight_map = read_json_object(self.path / INDEX, self.label).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.label}: {INDEX} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                raise CheckpointError(
                    f"{self.label}: {INDEX} names {file!r}, which is not a file of this folder, for {name}"
                )
        return sorted(set(weight_map.values()))

    def _read_headers(self) -> None:
        """List the tensors of all files, whichever file the index names for them, as transformers does."""
        for file in self.files:
            with self._open(file) as opened:
                for stored in opened.keys():  # noqa: SIM118, not a dict
                    name = self._renamed.get(stored, stored)
                    if name in self.weight_map:
                        raise CheckpointError(
                            f"{self.label} has {name} in {self.weight_map[name]} and in {file}: remove one"
                        )
                    self.weight_map[name], self._names[name] = file, stored
                    self.shapes[name] = opened.get_slice(stored).get_shape()

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, "pt")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{self.label}: {name} cannot be read: {error}") from None

    def check_shapes(self, needed: Mapping[str, Sequence[int]]) -> None:
        """Raise CheckpointError if a weight is missing or has another shape."""
        if missing := [name for name in needed if name not in self.shapes]:
            raise CheckpointError(f"{self.label} lacks {len(missing)} weights, the first is {missing[0]}")
        for name, shape in needed.items():
            if self.shapes[name] != list(shape):
                raise CheckpointError(
                    f"{self.label} has {name} as {self.shapes[name]}, its config.json requires {list(shape)}"
                )

    def read(self, name: str) -> Tensor:
        """Return a weight as it is stored. Raise CheckpointError if it is corrupt or not in floating point."""
        with self._open(self.weight_map[name]) as file:
            return self._checked(name, lambda: file.get_tensor(self._names[name]))

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        """Return a block of a weight as it is stored. Its file stays open for further blocks.

        Raise CheckpointError if the weight is corrupt or not in floating point.
        """
        file = self.weight_map[name]
        if file not in self._opened:
            self._opened[file] = self._open(file)
        return self._checked(name, lambda: self._opened[file].get_slice(self._names[name])[block])

    def _checked(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        try:
            tensor = read()
        except SafetensorError as error:
            raise CheckpointError(f"{self.label}: {name} cannot be read: {error}") from None
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{self.label}: {name} is {tensor.dtype}: only floating point can be imported")
        return tensor
