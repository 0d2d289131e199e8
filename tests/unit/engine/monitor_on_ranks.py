"""A step on every rank in which a gradient, or a loss, of one of them is not finite."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from deepspeed.runtime.pipe import schedule

from mtp_dist.config import Config
from mtp_dist.engine.hooks import hook_instruction
from mtp_dist.engine.tensor_shards import master_weight
from mtp_dist.model.parameters import named_weights
from tests.engines import open_engine, take_step


class Watched(NamedTuple):
    grad_norm: float
    grad_norms_by_module: dict[str, float]
    """Of a step in which all is well."""
    bad_norm: float
    """The gradient's, of the step after it."""
    skipped: str | None
    unchanged: bool
    """The weights, by that step."""
    seconds: tuple[float, float]
    """Busy, and of the schedule."""


def watch(config: Config, rank: int, weight: str | None, head: int | None) -> Watched:
    """weight: whose gradient, and head: whose loss is not finite on that rank in the second step."""
    engine = open_engine(config)
    topology = engine.topology
    well = take_step(engine, rate=1e-3)
    weights = dict(named_weights(engine.stage))
    before = {name: value.detach().clone() for name, value in weights.items()}
    if topology.rank == rank and weight:
        weights[weight].register_hook(lambda gradient: gradient * float("nan"))
    if topology.rank == rank and head:
        heads = engine.stage.heads
        loss = heads.forward

        def with_infinite_loss(*args: object) -> torch.Tensor:
            share = loss(*args)
            heads.sums.cross_entropy[head - 1] = float("inf")
            return share

        heads.forward = with_infinite_loss  # type: ignore[method-assign]
    bad = take_step(engine, rate=1e-3)
    unchanged = all(torch.equal(before[name], value) for name, value in weights.items())
    return Watched(well.grad_norm, well.grad_norms_by_module, bad.grad_norm, bad.skipped, unchanged, bad[-2:])


class Dropped(NamedTuple):
    norm: float
    skipped: str | None
    unchanged: bool


def break_a_sum(config: Config, rank: int) -> Dropped:
    """A step in which one rank has something else than the others for the sum of their gradients."""
    engine = open_engine(config)
    weights = dict(named_weights(engine.stage))
    before = {name: master_weight(weight).clone() for name, weight in weights.items()}

    def break_first(execute: Callable[[], None]) -> None:
        if engine.topology.rank == rank:
            weight = next(iter(weights.values()))
            gradient = weight.grad if config.train.precision == "fp32" else weight._hp_grad  # type: ignore[attr-defined]
            assert gradient is not None
            gradient.view(-1)[-1] = float("nan")
        execute()

    hook_instruction(engine.pipeline, schedule.OptimizerStep, break_first)
    result = take_step(engine, rate=1e-3)
    unchanged = all(torch.equal(before[name], master_weight(weight)) for name, weight in weights.items())
    return Dropped(result.grad_norm, result.skipped, unchanged)
