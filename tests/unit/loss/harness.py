"""Linear cross-entropies on the ranks of a test, their fp64 truth, and the comparison of both."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_dist.config import Config
from mtp_dist.model.targets import IGNORE_INDEX
from tests.errors import norm_error
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


def initialize(config: Config) -> Any:
    """Open the process groups on a rank of the test and return the topology."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology

    return initialize_topology(config, select_device(config))


def run_cases(
    ranks: Ranks,
    size: int,
    function: Callable[..., list[Answer]],
    cases: Mapping[str, Case],
    *arguments: Any,
    sequence: bool = False,
) -> dict[str, list[Answer]]:
    """Return the answers of all ranks to each case: `function(config, cases, *arguments)` runs on every rank."""
    config = tiny_config(parallel={"tensor": size, "sequence": sequence}, model={"num_query_groups": 4})
    by_rank = ranks.run(size, function, config, list(cases.values()), *arguments)
    return dict(zip(cases, (list(answers) for answers in zip(*by_rank, strict=True)), strict=True))


class Collectives(TorchDispatchMode):
    """Counts the collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def shard_rows(weight: Tensor, rank: int, ranks: int) -> Tensor:
    """Return the rank's rows of a weight `[V, D]`; rows of padding are far from 0, so that reading them has effects."""
    from mtp_dist.config.schema import padded_vocab_size

    missing = padded_vocab_size(len(weight), ranks) - len(weight)
    return F.pad(weight, (0, 0, 0, missing), value=64.0).chunk(ranks)[rank].contiguous()


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
    soft: tuple[Tensor, Tensor] | None = None
    """Token ids and probabilities, `[T, N]` each."""
    soft_weight: float = 0.0

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
    forward_sums: Tensor | None = None
    """Row of HeadSums without gradients."""
    collectives: tuple[Counter[str], ...] = ()
    """With gradients, and without."""


def fp64_truth(case: LinearCase) -> tuple[Tensor, Tensor, Tensor]:
    """Return the row of HeadSums and the gradients of hidden and weight, in fp64 by autograd."""
    hidden, weight = (tensor.double().clone().requires_grad_() for tensor in (case.hidden, case.weight))
    logits, valid = hidden @ weight.T, case.targets != IGNORE_INDEX
    loss = F.cross_entropy(logits, case.targets, ignore_index=IGNORE_INDEX, reduction="sum")
    squares = logits.logsumexp(1).square()[valid].sum()
    soft = logits.new_zeros(())
    if case.soft:
        soft = F.cross_entropy(logits, dense_distribution(*case.soft, len(weight)), reduction="sum")
    (case.scale * (loss + case.z_loss * squares + case.soft_weight * soft)).backward()
    below = logits[valid] < logits[valid].gather(1, case.targets[valid, None])
    correct = (below.sum(1) == len(weight) - 1).sum()
    assert hidden.grad is not None and weight.grad is not None
    sums = torch.stack([loss.detach(), squares.detach(), correct, soft.detach(), valid.sum()])
    return sums, hidden.grad, weight.grad


def dense_distribution(token_ids: Tensor, probabilities: Tensor, vocab_size: int) -> Tensor:
    """Return soft targets as `[T, V]`, fp64; ids of padding must have probability 0."""
    dense = torch.zeros(len(token_ids), 256, dtype=torch.float64).scatter_add_(1, token_ids, probabilities.double())
    assert not dense[:, vocab_size:].any()
    return dense[:, :vocab_size]


def kernel_answer(case: LinearCase, weight: Tensor, group: Any) -> LinearAnswer:
    """Run the kernel with this rank's rows."""
    from mtp_dist.loss.linear_cross_entropy import GradientBuffers, accumulation_dtype, linear_cross_entropy
    from mtp_dist.loss.objective import HeadSums, SoftTargets, Vocabulary

    dtype = accumulation_dtype(weight.dtype)
    grads = GradientBuffers(
        scale=torch.tensor(case.scale),
        z_loss=case.z_loss,
        hidden=torch.full_like(case.hidden, float("nan")),
        weight=None if case.frozen else torch.full_like(weight, case.start, dtype=dtype),
        soft_weight=case.soft_weight,
    )
    vocabulary = Vocabulary(len(case.weight), IGNORE_INDEX, group)
    sums, forward_sums = torch.zeros(2, len(HeadSums.COLUMNS), dtype=dtype)
    inputs = case.hidden, weight, case.targets, vocabulary
    soft = case.soft and SoftTargets(*case.soft)
    with Collectives() as both:
        linear_cross_entropy(*inputs, sums, case.chunk_tokens, grads, soft)
    with Collectives() as forward:
        linear_cross_entropy(*inputs, forward_sums, case.chunk_tokens, soft=soft)
    return LinearAnswer(sums, grads.hidden, grads.weight, forward_sums, (both.counts, forward.counts))


def kernel_answers(config: Config, cases: list[LinearCase]) -> list[LinearAnswer]:
    from mtp_dist.distributed.topology import tp_group

    topology = initialize(config)
    return [
        kernel_answer(case, shard_rows(case.weight, topology.tp_rank, topology.tp_size), tp_group()) for case in cases
    ]


def naive_answers(config: Config, cases: list[LinearCase]) -> list[LinearAnswer]:
    """Run the naive mode's row of sums on the logits of each case, with autograd."""
    from mtp_dist.distributed.topology import tp_group
    from mtp_dist.loss.naive import head_sums
    from mtp_dist.loss.objective import HeadSums, Objective, Vocabulary

    topology = initialize(config)
    answers = []
    for case in cases:
        weight = shard_rows(case.weight, topology.tp_rank, topology.tp_size).requires_grad_()
        hidden, vocabulary = case.hidden.clone().requires_grad_(), Vocabulary(VOCAB_SIZE, IGNORE_INDEX, tp_group())
        token_ids = topology.tp_rank * len(weight) + torch.arange(len(weight))
        logits = F.linear(hidden, weight).masked_fill(token_ids >= VOCAB_SIZE, float("-inf"))[:, None]
        targets = case.targets[:, None]
        objective = Objective(targets[None], 1, torch.tensor([case.scale, 0.0]), vocabulary, case.z_loss)
        row = head_sums(logits, targets, objective)
        sums = HeadSums(torch.stack([row, torch.zeros_like(row)]))
        objective.loss(sums).backward()
        assert hidden.grad is not None
        answers.append(LinearAnswer(sums.tensor[0].detach(), hidden.grad, weight.grad))
    return answers


def assert_equals_fp64(
    case: LinearCase, found: list[LinearAnswer], bounds: tuple[float, float], hidden_bound: float | None = None
) -> None:
    """bounds: relative errors of the sums and of the gradients; hidden_bound: that of hidden, if it differs."""
    sums, grad_hidden, grad_weight = fp64_truth(case)
    sum_bound, gradient_bound = bounds
    for answer in found:
        assert torch.equal(answer.sums, found[0].sums), "every rank has the same bits"
        assert answer.forward_sums is None or torch.equal(answer.sums, answer.forward_sums), "with gradients or without"
    for index in (0, 1, 3):
        if index != 1 or case.z_loss or found[0].sums[1]:  # the naive mode computes the term only for the z-loss
            assert norm_error(found[0].sums[index], sums[index]) <= sum_bound
    assert found[0].sums[2] == sums[2], "correct"
    assert found[0].sums[4] == sums[4], "targets"
    hidden = torch.stack([answer.hidden.double() for answer in found]).sum(0)
    assert norm_error(hidden, grad_hidden) <= (hidden_bound or gradient_bound)
    assert not hidden[~grad_hidden.any(1)].any(), "positions without any target"
    if case.frozen:
        assert all(answer.weight is None for answer in found)
        return
    weight = torch.cat([answer.weight for answer in found if answer.weight is not None]) - case.start
    assert norm_error(weight[: len(case.weight)], grad_weight) <= gradient_bound
    assert not weight[len(case.weight) :].any(), "padding"
