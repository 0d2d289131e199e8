"""AdamW, by the fastest implementation on this device, and its learning rates."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.config.base import StepValues, value_at_step
from mtp_dist.model.parameters import model_part

BuildAdamW = Callable[..., torch.optim.Optimizer]


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of update number `step`, counted from 1.

    Linear warmup that reaches the peak at update `warmup_steps`, then a cosine to `min_lr_ratio * lr` at the last one.
    """
    optimizer = config.optimizer
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, config.train.steps - optimizer.warmup_steps)
    floor = optimizer.min_lr_ratio
    return optimizer.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


GroupKey = tuple[bool, StepValues]
"""Exemption of weights from weight decay, and the factors of their learning rate."""


def group_key(config: Config, name: str, ndim: int) -> GroupKey:
    """Return what the weights of a group of the optimizer have in common, for a weight by its global name."""
    multiplier = config.optimizer.multiplier(model_part(name))
    return ndim <= 1, multiplier if isinstance(multiplier, tuple) else ((1, multiplier),)


def parameter_groups(config: Config, parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Return the matrices with weight decay, then norms and biases without, for each learning rate a group of its own.

    parameters: by global name. `multiplier` of a group are the factors of its learning rate, see `set_learning_rate`.
    """
    groups: dict[GroupKey, list[Tensor]] = {}
    for name, weight in parameters:
        groups.setdefault(group_key(config, name, weight.ndim), []).append(weight)
    decay = config.optimizer.weight_decay
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else decay, "multiplier": key[1]}
        for key in sorted(groups)
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, step: int) -> None:
    """Set the learning rate of every group to its multiple of `rate` at a step, counted from 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate * value_at_step(group["multiplier"], step)


def build_optimizer(
    config: Config, parameters: Iterable[tuple[str, Tensor]], device: torch.device
) -> torch.optim.Optimizer:
    """Build AdamW over the parameters, given by global name."""
    groups = parameter_groups(config, parameters)
    return adamw_class(device)(groups, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps)


def adamw_class(device: torch.device) -> BuildAdamW:
    """Return Apex's fused AdamW on a GPU if it is installed, PyTorch's fused one if not; the unfused one on a CPU.

    All of them decouple the weight decay.
    """
    if device.type == "cuda":
        return _apex_fused_adam() or partial(torch.optim.AdamW, fused=True)
    return torch.optim.AdamW


def _apex_fused_adam() -> BuildAdamW | None:
    """Return None without Apex's compiled kernels."""
    try:
        import amp_C  # noqa: F401, the kernels: a build of Apex without them has the class, which then raises
        from apex.optimizers import FusedAdam
    except Exception:  # the package called `apex` on PyPI is an unrelated one, which may raise anything
        return None
    return FusedAdam
