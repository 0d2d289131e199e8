"""What the loss tests run on every rank."""

from dataclasses import dataclass

from torch import Tensor

from mtp_dist.config import Config

UPSTREAM = 0.25
"""Gradient that arrives at the loss."""


@dataclass
class Case:
    logits: Tensor
    """`[S, B, V]` over the padded vocabulary."""
    targets: Tensor
    """`[S, B]`."""


@dataclass
class Answer:
    loss: Tensor
    gradient: Tensor
    """Of this rank's logits, times UPSTREAM."""
    correct: int


def losses_of(config: Config, cases: list[Case]) -> list[Answer]:
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.loss.naive import count_correct, cross_entropy_sum
    from mtp_dist.model.targets import IGNORE_INDEX

    topology = initialize_topology(config, select_device(config))
    answers = []
    for case in cases:
        leaf = case.logits.chunk(topology.tp_size, -1)[topology.tp_rank].clone().requires_grad_()
        logits = leaf * 1.0  # as the model gives them: not a leaf
        correct = int(count_correct(logits, case.targets))
        loss = cross_entropy_sum(logits, case.targets, IGNORE_INDEX)
        (UPSTREAM * loss).backward()
        assert leaf.grad is not None
        answers.append(Answer(loss.detach(), leaf.grad, correct))
    return answers


def hits_of_almost_ties(config: Config) -> float:
    """Hits that the heads' loss counts for logits that only full precision tells apart: 1e-9, 5e-10 and 0."""
    import torch

    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, tp_group
    from mtp_dist.loss.linear_cross_entropy import Vocabulary
    from mtp_dist.loss.naive import naive_heads_loss
    from mtp_dist.loss.objective import Heads, HeadSums, Objective
    from mtp_dist.model.targets import IGNORE_INDEX

    initialize_topology(config, select_device(config))
    logits = torch.zeros(4, 1, 8)
    logits[..., 5], logits[..., 2] = 1e-9, 5e-10
    sums = HeadSums.zeros(1, logits.device)
    heads = Heads([[1]], (), lambda k, z: z, lambda k, state: state, lambda k, hidden: hidden * 1.0, [], [])
    objective = Objective(torch.full((1, 1, 4), 5), 1, torch.ones(1), Vocabulary(8, IGNORE_INDEX, tp_group()))
    naive_heads_loss(heads, logits, objective, sums)
    return float(sums.correct[0])
