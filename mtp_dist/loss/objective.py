"""The loss of all heads for one micro-batch, from the trunk's output to a scalar."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.loss.linear_cross_entropy import LossSums, SoftTargets, Vocabulary

TOKEN_ORDER = 0
"""Its place among the heads' sums."""


@dataclass(frozen=True)
class Heads:
    """What the loss asks of the heads, k = 1..n.

    Tensors `[S, B, D]` are `[S/TP, B, D]` under sequence parallelism, but for the hidden states that `logits` takes.
    """

    chains: Sequence[Sequence[int]]
    """Heads in the order in which they run. The first of a chain reads z, each other one the state before its own."""
    detached: Collection[int]
    """Heads that hand no gradient to what they read."""
    state: Callable[[int, Tensor], Tensor]
    """(k, z or the state of the head before it `[S, B, D]`) -> the state of head k, shaped like it."""
    hidden: Callable[[int, Tensor], Tensor]
    """(k, its state) -> its normalized hidden states, shaped like it."""
    logits: Callable[[int, Tensor], Tensor]
    """(k, its hidden states) -> this rank's logits `[S, B, V/TP]`, -inf at padded entries."""
    weights: Sequence[Tensor]
    """What `state` and `hidden` compute with and training changes."""
    unembeddings: Sequence[Tensor]
    """This rank's rows `[V/TP, D]` for each head; n times the same tensor where it is shared."""
    token_order: Tensor | None = None
    """This rank's rows `[V/TP, D]` of the unembedding that predicts the tokens' order from head 1's hidden states."""


@dataclass(frozen=True)
class Distillation:
    """What the heads from head 2 on learn from head 1."""

    weight: float
    """Beside that of their own targets."""
    top: int
    """Most probable tokens of head 1 that they see."""
    distances: Sequence[int]
    """Positions ahead that heads 1..n predict."""


@dataclass(frozen=True)
class TokenOrder:
    """What the further unembedding learns."""

    scale: Tensor
    """Scalar: its weight over the number of head 1's valid targets in the global batch, times what the engine averages
    over."""
    targets: SoftTargets
    """Of the `S * B` positions."""


@dataclass(frozen=True)
class Objective:
    """The loss of a micro-batch: sum_k scales[k-1] * (cross-entropies of head k + z_loss * squared normalizers).

    Further terms where there is `distillation` or `token_order`.
    """

    targets: Tensor
    """`[n, B, S]`."""
    active: int
    """Heads 1..this run; the others have no loss."""
    scales: Tensor
    """`[n]`: head k's weight over the number of its valid targets in the global batch, times the micro-batches and
    data-parallel ranks that the engine averages over."""
    vocabulary: Vocabulary
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    """Tokens whose logits the sequential modes hold at once; from a memory budget when None."""
    sequence_parallel: bool = False
    distillation: Distillation | None = None
    token_order: TokenOrder | None = None

    def running(self, chain: Sequence[int]) -> list[int]:
        """The active heads of a chain."""
        return [head for head in chain if head <= self.active]

    def loss(self, sums: Mapping[int, LossSums]) -> Tensor:
        """The scalar, from what each active head has summed."""
        soft_weight = self.distillation.weight if self.distillation else 0.0
        terms = [
            self.scales[head - 1]
            * (of_head.cross_entropy + self.z_loss * of_head.log_z_squared + soft_weight * of_head.soft_cross_entropy)
            for head, of_head in sorted(sums.items())
            if head != TOKEN_ORDER
        ]
        if self.token_order:
            terms.append(self.token_order.scale * sums[TOKEN_ORDER].soft_cross_entropy)
        return torch.stack(terms).sum()


@dataclass
class HeadSums:
    """What the heads have summed over micro-batches, each `[n]` but the last, fp64."""

    losses: Tensor
    correct: Tensor
    targets: Tensor
    distillation: Tensor
    """Cross-entropies to head 1's distributions."""
    token_order: Tensor
    """Cross-entropies to the order of the upcoming tokens: a scalar."""

    @classmethod
    def zeros(cls, heads: int, device: torch.device) -> "HeadSums":
        shapes = [(heads,)] * 4 + [()]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def record(self, objective: Objective, sums: Mapping[int, LossSums]) -> Tensor:
        """Add one micro-batch's losses, hits and valid targets; returns its loss."""
        for head, of_head in sums.items():
            if head == TOKEN_ORDER:
                self.token_order += of_head.soft_cross_entropy
                continue
            self.distillation[head - 1] += of_head.soft_cross_entropy
            self.losses[head - 1] += of_head.cross_entropy.detach()
            self.correct[head - 1] += of_head.correct
            self.targets[head - 1] += (objective.targets[head - 1] != objective.vocabulary.ignore_index).sum()
        return objective.loss(sums)
