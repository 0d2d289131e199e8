"""Trainings on every rank with the optimizers that a GPU would have, on the CPU."""

import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from mtp_dist.config import Config
from mtp_dist.engine.optimizer import adamw_class
from tests.engines import open_engine, take_step
from tests.unit.checkpoint.on_ranks import Part, train_part


class ApexFusedAdam(torch.optim.Optimizer):
    """A stand-in for NVIDIA Apex's FusedAdam: it counts its updates per group, not per weight."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                state["exp_avg"].lerp_(weight.grad, 1 - first)
                state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                deviation = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt() + group["eps"]
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / deviation)


class CountsOnTheLastWeight(torch.optim.AdamW):
    """As DeepSpeed's FusedAdam: the counters of the other weights stay at 0."""

    def step(self, *args: Any) -> Any:
        loss = super().step(*args)
        for group in self.param_groups:
            for weight in group["params"][:-1]:
                self.state[weight]["step"].zero_()
        return loss


def apex_modules(installed: bool) -> dict[str, ModuleType | None]:
    """What `sys.modules` has with Apex, and without it."""
    if not installed:
        return {"amp_C": None, "apex": None, "apex.optimizers": None}
    optimizers = ModuleType("apex.optimizers")
    optimizers.FusedAdam = ApexFusedAdam  # type: ignore[attr-defined]
    return {"amp_C": ModuleType("amp_C"), "apex": ModuleType("apex"), "apex.optimizers": optimizers}


def train_part_as_on_a_gpu(apex: bool, *arguments: Any) -> Part:
    """`train_part` with the optimizer of a GPU, on a machine with Apex or without."""
    with (
        patch.dict(sys.modules, apex_modules(apex)),
        patch("mtp_dist.engine.optimizer.adamw_class", lambda device: adamw_class(torch.device("cuda"))),
    ):
        return train_part(*arguments)


def train_part_with_wrong_counters(config: Config) -> None:
    """Save after two updates of an optimizer whose counters disagree."""
    with patch("mtp_dist.engine.optimizer.adamw_class", lambda device: CountsOnTheLastWeight):
        train_part(config, 0, 2)


def timers_after_steps(config: Config) -> list[int]:
    """Measurements that DeepSpeed's timers hold after each of four steps."""
    engine, held = open_engine(config), []
    for _ in range(4):
        take_step(engine)
        held.append(sum(len(timer.event_timers) for timer in engine.pipeline.timers.get_timers().values()))
    return held
