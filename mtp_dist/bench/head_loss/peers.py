"""What others offer for the loss of several heads, beside which the benchmark puts this project's modes."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.bench.head_loss.inputs import Inputs, Loss


def _sum_of_heads(head_loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, targets: Tensor) -> Tensor:
    """head_loss: (hidden `[T, D]`, unembedding `[V, D]`, targets `[T]`) -> mean cross-entropy."""
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
class Peer:
    """Somebody else's way to compute the same; without tensor parallelism."""

    loss: Loss
    package: str = "torch"
    needs_cuda: bool = False
    needs_bf16: bool = False

    def obstacle(self, device: str, dtype: str, tp: int) -> str | None:
        """Why it cannot run, as the end of a sentence that begins with its name."""
        if tp > 1:
            return "needs --tp 1"
        if self.needs_cuda and device != "cuda":
            return "needs an NVIDIA GPU"
        if importlib.util.find_spec(self.package) is None:
            return f"needs the package {self.package.replace('_', '-')}, which is not installed"
        return "needs --dtype bf16" if self.needs_bf16 and dtype != "bf16" else None


PEERS = {
    "pytorch": Peer(_pytorch),
    "compiled": Peer(_compiled),
    "liger": Peer(_liger, "liger_kernel", needs_cuda=True),
    "cut-cross-entropy": Peer(_cut_cross_entropy, "cut_cross_entropy", needs_cuda=True, needs_bf16=True),
}
