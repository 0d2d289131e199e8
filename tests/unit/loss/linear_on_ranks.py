"""What the tests of the linear cross-entropy run on every rank."""

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


@dataclass
class LinearAnswer:
    sums: Tensor
    """Cross-entropy, squared normalizer, correct."""
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
    from mtp_dist.model.weights import padded_vocab_size

    missing = padded_vocab_size(len(weight), ranks) - len(weight)
    return F.pad(weight, (0, 0, 0, missing), value=64.0).chunk(ranks)[rank].contiguous()


def linear_answers(config: Config, cases: list[LinearCase]) -> list[LinearAnswer]:
    from mtp_dist.parallel.device import select_device
    from mtp_dist.parallel.topology import initialize_topology, tensor_group

    initialize_topology(config, select_device(config))
    return [_answer(case, tensor_group()) for case in cases]


def _answer(case: LinearCase, group: Any) -> LinearAnswer:
    from mtp_dist.loss.linear_cross_entropy import GradientRequest, Vocabulary, accumulation_dtype, linear_cross_entropy
    from mtp_dist.model.targets import IGNORE_INDEX

    weight = shard_of(case.weight, group.rank(), group.size())
    dtype = accumulation_dtype(weight.dtype)
    request = GradientRequest(
        scale=torch.tensor(case.scale),
        z_loss=case.z_loss,
        hidden=torch.full_like(case.hidden, float("nan")),
        weight=None if case.frozen else torch.full_like(weight, case.start, dtype=dtype),
    )
    vocabulary = Vocabulary(len(case.weight), IGNORE_INDEX, group)
    arguments = case.hidden, weight, case.targets, vocabulary, case.chunk_tokens
    with Collectives() as both:
        sums = linear_cross_entropy(*arguments, request)
    with Collectives() as forward:
        forward_sums = linear_cross_entropy(*arguments)
    assert all(value.dtype == dtype for value in sums)
    return LinearAnswer(
        torch.stack([*sums]),
        torch.stack([*forward_sums]),
        request.hidden,
        request.weight,
        [both.counts, forward.counts],
    )
