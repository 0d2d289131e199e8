"""The loss of all heads for one micro-batch, from the trunk's output to a scalar."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.loss.cross_entropy import count_correct, cross_entropy_sum


@dataclass
class HeadSums:
    """What the heads have summed over micro-batches, each `[n]`, fp64."""

    losses: Tensor
    correct: Tensor
    targets: Tensor

    @classmethod
    def zeros(cls, heads: int, device: torch.device) -> "HeadSums":
        return cls(*(torch.zeros(heads, dtype=torch.float64, device=device) for _ in range(3)))


def naive_heads_loss(
    head_logits: Callable[[int, Tensor], Tensor],
    trunk_output: Tensor,
    targets: Tensor,
    scales: Tensor,
    ignore_index: int,
    sums: HeadSums,
) -> Tensor:
    """sum_k scales[k-1] * (sum of head k's cross-entropies), a scalar; all heads' logits stay alive for the backward.

    head_logits maps (k, z) to this rank's logits `[S, B, V/TP]`; trunk_output is z; targets `[n, B, S]`; scales `[n]`.
    Adds the micro-batch's losses, hits and valid targets to `sums`.
    """
    total = scales.new_zeros(())
    for distance in range(1, len(targets) + 1):
        logits = head_logits(distance, trunk_output)
        target = targets[distance - 1].T.contiguous()
        sums.correct[distance - 1] += count_correct(logits, target)
        loss = cross_entropy_sum(logits, target, ignore_index)
        total = total + scales[distance - 1] * loss
        sums.losses[distance - 1] += loss.detach()
        sums.targets[distance - 1] += (target != ignore_index).sum()
    return total
