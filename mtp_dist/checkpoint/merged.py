"""The weights of a checkpoint's model: low-rank adapters are merged into the matrices that they adapt."""

from pathlib import Path

import torch
from torch import Tensor

from mtp_dist.checkpoint.format import MODEL, read_metadata
from mtp_dist.checkpoint.reader import TensorReader
from mtp_dist.model.parameters import LORA_A, LORA_B


class MergedWeights:
    """The weights of a checkpoint by global name, read one by one or in blocks.

    An adapted W is W + (alpha / rank) B A; without adapters the weights are those of the files.
    """

    def __init__(self, folder: Path) -> None:
        """Raise CheckpointError if the metadata or the index is missing or corrupt."""
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.config = self.metadata.config.without_adapters()
        """Configuration of a model with these weights."""
        self.tensors = TensorReader(folder, MODEL)
        self._low_rank = self.metadata.config.train.low_rank

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight from the files' headers. Raise CheckpointError if one is corrupt."""
        return {name: shape for name, shape in self.tensors.shapes().items() if not name.endswith((LORA_A, LORA_B))}

    def read(self, name: str) -> Tensor:
        """Return a full weight, fp32 on the CPU. Raise CheckpointError if its file is missing or corrupt."""
        weight = self.tensors.read(name)
        adapter = self.adapter(name)
        return self._merged(weight, *map(self.tensors.read, adapter)) if adapter else weight

    def read_block(self, name: str, block: tuple[slice, ...]) -> Tensor:
        """Return a block of a weight, fp32 on the CPU. Raise CheckpointError if its file is missing or corrupt."""
        weight = self.tensors.read_block(name, block)
        if not (adapter := self.adapter(name)):
            return weight
        rows, *columns = block
        a = self.tensors.read_block(adapter[0], (slice(None), *columns))
        return self._merged(weight, a, self.tensors.read_block(adapter[1], (rows,)))

    def adapter(self, name: str) -> tuple[str, str] | None:
        """Return the global names of the A and B that adapt a weight; None if it has no adapter."""
        matrix = name.removesuffix("weight")
        names = f"{matrix}{LORA_A}", f"{matrix}{LORA_B}"
        return names if names[0] in self.tensors.weight_map else None

    def _merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        assert self._low_rank, "a checkpoint with adapters was trained with train.low_rank"
        return torch.addmm(weight, b, a, alpha=self._low_rank.scale)
