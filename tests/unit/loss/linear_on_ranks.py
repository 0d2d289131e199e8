"""What the tests of the linear cross-entropy run on every rank, and what fp64 says."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_dist.config import Config


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
    """What every entry of the weight's gradient holds before."""
    frozen: bool = False
    soft: tuple[Tensor, Tensor] | None = None
    """Entries and probabilities, `[T, N]` each."""
    soft_weight: float = 0.0


@dataclass
class LinearAnswer:
    sums: Tensor
    """Cross-entropy, squared normalizer, correct, soft cross-entropy."""
    forward_sums: Tensor
    """Without gradients asked for."""
    hidden: Tensor
    """This rank's part of the gradient."""
    weight: Tensor | None
    """Gradient of this rank's rows, padding included."""
    collectives: list[Counter[str]]
    """With gradients, and without."""


class Collectives(TorchDispatchMode):
    """Counts the collectives within."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def shard_of(weight: Tensor, rank: int, ranks: int) -> Tensor:
    """The rank's rows of a weight `[V, D]`; rows of padding are far from 0, so that whoever reads them is found out."""
    from mtp_dist.config.schema import padded_vocab_size

    missing = padded_vocab_size(len(weight), ranks) - len(weight)
    return F.pad(weight, (0, 0, 0, missing), value=64.0).chunk(ranks)[rank].contiguous()


def truth_of(case: LinearCase) -> tuple[Tensor, Tensor, Tensor]:
    """The sums, and the gradients of hidden and weight, in fp64 by autograd."""
    from mtp_dist.model.targets import IGNORE_INDEX

    hidden, weight = (tensor.double().clone().requires_grad_() for tensor in (case.hidden, case.weight))
    logits, valid = hidden @ weight.T, case.targets != IGNORE_INDEX
    loss = F.cross_entropy(logits, case.targets, ignore_index=IGNORE_INDEX, reduction="sum")
    squares = logits.logsumexp(1).square()[valid].sum()
    soft = logits.new_zeros(())
    if case.soft:
        soft = F.cross_entropy(logits, dense_of(*case.soft, len(weight)), reduction="sum")
    (case.scale * (loss + case.z_loss * squares + case.soft_weight * soft)).backward()
    beaten = logits[valid] < logits[valid].gather(1, case.targets[valid, None])
    correct = (beaten.sum(1) == len(weight) - 1).sum().double()
    assert hidden.grad is not None and weight.grad is not None
    return torch.stack([loss.detach(), squares.detach(), correct, soft.detach()]), hidden.grad, weight.grad


def dense_of(entries: Tensor, probabilities: Tensor, vocab_size: int) -> Tensor:
    """`[T, V]`, fp64; what points into padding must have probability 0."""
    dense = torch.zeros(len(entries), 256, dtype=torch.float64).scatter_add_(1, entries, probabilities.double())
    assert not dense[:, vocab_size:].any()
    return dense[:, :vocab_size]


def linear_answers(config: Config, cases: list[LinearCase]) -> list[LinearAnswer]:
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, tp_group

    initialize_topology(config, select_device(config))
    return [_answer(case, tp_group()) for case in cases]


def _answer(case: LinearCase, group: Any) -> LinearAnswer:
    from mtp_dist.loss.linear_cross_entropy import (
        GradientBuffers,
        SoftTargets,
        Vocabulary,
        accumulation_dtype,
        linear_cross_entropy,
    )
    from mtp_dist.model.targets import IGNORE_INDEX

    weight = shard_of(case.weight, group.rank(), group.size())
    dtype = accumulation_dtype(weight.dtype)
    request = GradientBuffers(
        scale=torch.tensor(case.scale),
        z_loss=case.z_loss,
        hidden=torch.full_like(case.hidden, float("nan")),
        weight=None if case.frozen else torch.full_like(weight, case.start, dtype=dtype),
        soft_weight=case.soft_weight,
    )
    vocabulary = Vocabulary(len(case.weight), IGNORE_INDEX, group)
    arguments = case.hidden, weight, case.targets, vocabulary, case.chunk_tokens
    soft = case.soft and SoftTargets(*case.soft)
    with Collectives() as both:
        sums = linear_cross_entropy(*arguments, request, soft)
    with Collectives() as forward:
        forward_sums = linear_cross_entropy(*arguments, soft=soft)
    assert all(value.dtype == dtype for value in sums)
    return LinearAnswer(
        torch.stack(sums),
        torch.stack(forward_sums),
        request.hidden,
        request.weight,
        [both.counts, forward.counts],
    )
