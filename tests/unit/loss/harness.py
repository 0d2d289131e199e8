"""Losses on the ranks of a test, their fp64 truth, and the comparison of both."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_dist.config import Config
from mtp_dist.config.schema import padded_vocab_size
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import initialize_topology, tp_group
from mtp_dist.loss.linear_cross_entropy import GradientBuffers, accumulation_dtype, linear_cross_entropy
from mtp_dist.loss.naive import head_sums
from mtp_dist.loss.objective import HeadSums, Objective, SoftTargets, Vocabulary
from mtp_dist.model.targets import IGNORE_INDEX
from tests.ranks import Ranks
from tests.tiny import tiny_config

VOCAB_SIZE = 131
"""With 4 ranks of 64 rows the third has 3 real tokens and the fourth none."""
TOKENS, WIDTH = 26, 16
SIZES = [1, 2, 4]
ALONE = dist.ProcessGroup(0, 1)
"""A group of one rank that answers only for its rank and size."""

Case = TypeVar("Case")
Answer = TypeVar("Answer")


def answer_cases(config: Config, cases: list[Case], function: Callable[..., Answer], *arguments: Any) -> list[Answer]:
    """On each rank: return `function(case, group, *arguments)` of each case, with the group of the vocabulary."""
    initialize_topology(config, select_device(config))
    return [function(case, tp_group(), *arguments) for case in cases]


def run_cases(
    ranks: Ranks, size: int, function: Callable[..., Answer], cases: Mapping[str, Case], *arguments: Any
) -> dict[str, list[Answer]]:
    """Return the answers of all ranks to each case, see `answer_cases`."""
    config = tiny_config(parallel={"tensor": size}, model={"num_query_groups": 4})
    by_rank = ranks.run(size, answer_cases, config, list(cases.values()), function, *arguments)
    return {name: [answers[index] for answers in by_rank] for index, name in enumerate(cases)}


class Collectives(TorchDispatchMode):
    """Counts the collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def shard_rows(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the rank's rows of a weight `[V, D]`; rows of padding are far from 0, so that reading them has effects."""
    missing = padded_vocab_size(len(weight), group.size()) - len(weight)
    return F.pad(weight, (0, 0, 0, missing), value=64.0).chunk(group.size())[group.rank()].contiguous()


def naive_logits(hidden: Tensor, rows: Tensor, group: dist.ProcessGroup, vocab_size: int) -> Tensor:
    """Return this rank's logits, -inf at padded tokens."""
    token_ids = group.rank() * len(rows) + torch.arange(len(rows))
    return F.linear(hidden, rows).masked_fill(token_ids >= vocab_size, float("-inf"))


def dense_distribution(token_ids: Tensor, probabilities: Tensor, vocab_size: int) -> Tensor:
    """Return soft targets as `[T, V]`, fp64; ids of padding must have probability 0."""
    dense = torch.zeros(len(token_ids), 256, dtype=torch.float64).scatter_add_(1, token_ids, probabilities.double())
    assert not dense[:, vocab_size:].any()
    return dense[:, :vocab_size]


def true_sums(logits: Tensor, targets: Tensor, soft: SoftTargets | None = None) -> Tensor:
    """Return the row of HeadSums of fp64 logits `[T, V]` by PyTorch's own loss, with a graph."""
    valid, vocab_size = targets != IGNORE_INDEX, logits.shape[1]
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    squares = logits.logsumexp(1).square()[valid].sum()
    correct = ((logits[valid] < logits[valid].gather(1, targets[valid, None])).sum(1) == vocab_size - 1).sum()
    distribution = torch.zeros_like(logits)
    if soft:
        distribution = dense_distribution(soft.token_ids, soft.probabilities, vocab_size)
    soft_loss = F.cross_entropy(logits, distribution, reduction="sum")
    distance = torch.zeros_like(soft_loss)
    if soft and soft.total_variation:
        distance = (distribution - logits.softmax(1)).clamp(min=0).sum()
    return torch.stack([loss, squares, correct, soft_loss, distance, valid.sum()])


@dataclass
class LinearCase:
    hidden: Tensor
    """`[T, D]`."""
    weight: Tensor
    """`[V, D]` over the real vocabulary."""
    targets: Tensor
    """`[T]`."""
    chunk_tokens: int | None = None
    z_loss: float = 0.0
    scale: float = 0.25
    start: float = 0.0
    """What every element of the weight's gradient buffer holds before."""
    frozen: bool = False
    soft: SoftTargets | None = None
    soft_weight: float = 0.0
    total_variation_weight: float = 0.0

    def objective(self, sums: Tensor) -> Tensor:
        """Return what the gradients are of, from a row of HeadSums."""
        soft = self.soft_weight * sums[3] + self.total_variation_weight * sums[4]
        return self.scale * (sums[0] + self.z_loss * sums[1] + soft)

    def to(self, dtype: torch.dtype) -> "LinearCase":
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


@dataclass
class LinearAnswer:
    sums: Tensor
    """Row of HeadSums."""
    hidden: Tensor
    """This rank's part of the gradient."""
    weight: Tensor | None
    """Gradient of this rank's rows, padding included."""
    collectives: tuple[Counter[str], ...] = ()
    """With gradients, and without."""


def fp64_truth(case: LinearCase) -> tuple[Tensor, ...]:
    """Return the row of HeadSums and the gradients of hidden and weight, in fp64 by autograd."""
    hidden, weight = (tensor.double().detach().requires_grad_() for tensor in (case.hidden, case.weight))
    sums = true_sums(hidden @ weight.T, case.targets, case.soft)
    return sums.detach(), *torch.autograd.grad(case.objective(sums), [hidden, weight])


def kernel_answer(
    case: LinearCase,
    group: dist.ProcessGroup,
    rows: Tensor | None = None,
    on_logits: Sequence[Callable[[slice, Tensor], None]] = (),
) -> LinearAnswer:
    """Run the kernel with and without gradients on this rank's rows, by default those of `shard_rows`.

    Its inputs require gradients, of which autograd must record nothing.
    """
    weight = (shard_rows(case.weight, group) if rows is None else rows).detach().requires_grad_()
    hidden, dtype = case.hidden.detach().requires_grad_(), accumulation_dtype(weight.dtype)
    grads = GradientBuffers(
        scale=torch.tensor(case.scale),
        z_loss=case.z_loss,
        hidden=torch.full_like(hidden, float("nan")),
        weight=None if case.frozen else torch.full_like(weight, case.start, dtype=dtype),
        soft_weight=case.soft_weight,
        total_variation_weight=case.total_variation_weight,
    )
    sums, forward_sums = torch.zeros(2, len(HeadSums.COLUMNS), dtype=dtype)
    inputs = hidden, weight, case.targets, Vocabulary(len(case.weight), IGNORE_INDEX, group)
    with Collectives() as both:
        linear_cross_entropy(*inputs, sums, case.chunk_tokens, grads, case.soft, on_logits)
    with Collectives() as forward:
        linear_cross_entropy(*inputs, forward_sums, case.chunk_tokens, soft=case.soft)
    assert torch.equal(sums, forward_sums), "with gradients or without"
    return LinearAnswer(sums, grads.hidden, grads.weight, (both.counts, forward.counts))


def naive_answer(case: LinearCase, group: dist.ProcessGroup) -> LinearAnswer:
    """Run the naive mode's row of sums on this rank's logits, with autograd."""
    weight, hidden = shard_rows(case.weight, group).requires_grad_(), case.hidden.detach().requires_grad_()
    logits, targets = naive_logits(hidden, weight, group, VOCAB_SIZE)[:, None], case.targets[:, None]
    vocabulary = Vocabulary(VOCAB_SIZE, IGNORE_INDEX, group)
    sums = head_sums(logits, targets, Objective(targets[None], 1, torch.ones(2), vocabulary, case.z_loss))
    return LinearAnswer(sums.detach(), *torch.autograd.grad(case.objective(sums), [hidden, weight]))
