"""What every way to the heads' loss starts from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Inputs:
    """The leaves of one mode: their `.grad` is its result."""

    trunk_output: Tensor
    """z, `[T, 1, D]`."""
    norms: list[Tensor]
    """Each head's own norm weight `[D]`."""
    unembedding: Tensor
    """`[V/TP, D]` with padded rows; `[V, D]` for the peers."""

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.norms, self.unembedding]

    def hidden(self, distance: int, trunk_output: Tensor) -> Tensor:
        """Head `distance`: the smallest one that differs from the others."""
        norm = self.norms[distance - 1]
        return F.rms_norm(trunk_output, norm.shape, norm, NORM_EPS)

    def clear(self) -> None:
        for leaf in (self.trunk_output, *self.parameters):
            leaf.grad = None


def gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


Loss = Callable[[Inputs, Tensor], Tensor]
"""(inputs, targets `[n, 1, T]`) -> sum over the heads of their mean cross-entropy."""
