"""Other implementations of the loss of several heads, with which the benchmark compares the modes of mtp-dist."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Inputs:
    """The leaves of one mode, whose `.grad` is its result."""

    trunk_output: Tensor
    """Trunk output z, `[T, 1, D]`."""
    norms: list[Tensor]
    """Norm weight `[D]` of each head."""
    unembedding: Tensor
    """Weight `[V/TP, D]` with padded rows; `[V, D]` for the baselines."""

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.norms, self.unembedding]

    def hidden(self, distance: int, trunk_output: Tensor) -> Tensor:
        """Return the output of head `distance`: the smallest head that differs from the others."""
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


def _sum_of_heads(head_loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, targets: Tensor) -> Tensor:
    """Return the sum over the heads.

    head_loss: (hidden `[T, D]`, unembedding `[V, D]`, targets `[T]`) -> mean cross-entropy.
    """
    losses = (
        head_loss(inputs.hidden(k, inputs.trunk_output).flatten(0, 1), inputs.unembedding, head_targets.flatten())
        for k, head_targets in enumerate(targets, 1)
    )
    return torch.stack(list(losses)).sum()


def _pytorch(inputs: Inputs, targets: Tensor) -> Tensor:
    return _sum_of_heads(lambda hidden, weight, t: F.cross_entropy((hidden @ weight.T).float(), t), inputs, targets)


@functools.cache
def _compiler() -> Loss:
    # Not dynamic: it would compile one slower program for all numbers of heads.
    return torch.compile(_pytorch, dynamic=False)


def _compiled(inputs: Inputs, targets: Tensor) -> Tensor:
    return _compiler()(inputs, targets)


def _liger(inputs: Inputs, targets: Tensor) -> Tensor:
    liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return _sum_of_heads(lambda hidden, weight, t: liger(weight, hidden, t), inputs, targets)


def _cut_cross_entropy(inputs: Inputs, targets: Tensor) -> Tensor:
    return _sum_of_heads(importlib.import_module("cut_cross_entropy").linear_cross_entropy, inputs, targets)


@dataclass(frozen=True)
class Baseline:
    """An implementation of the same loss, without tensor parallelism."""

    loss: Loss
    package: str = "torch"
    needs_cuda: bool = False
    needs_bf16: bool = False

    def obstacle(self, device: str, dtype: str, tp: int) -> str | None:
        """Return why it cannot run, as the end of a sentence that begins with its name; None if it can."""
        if tp > 1:
            return "needs --tp 1"
        if self.needs_cuda and device != "cuda":
            return "needs an NVIDIA GPU"
        if importlib.util.find_spec(self.package) is None:
            return f"needs the package {self.package.replace('_', '-')}, which is not installed"
        return "needs --dtype bf16" if self.needs_bf16 and dtype != "bf16" else None


BASELINES = {
    "pytorch": Baseline(_pytorch),
    "compiled": Baseline(_compiled),
    "liger": Baseline(_liger, "liger_kernel", needs_cuda=True),
    "cut-cross-entropy": Baseline(_cut_cross_entropy, "cut_cross_entropy", needs_cuda=True, needs_bf16=True),
}
