"""AdamW and its learning rate."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mtp_dist.config import Config
from mtp_dist.engine.adam import adamw_class


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of update number `step`, counted from 1.

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


def parameter_groups(config: Config, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices with weight decay, then norms and biases without."""
    weights = list(parameters)
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": config.optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the parameters, by the fastest implementation on this device."""
    adamw = adamw_class(device)
    groups = [group for group in parameter_groups(config, parameters) if group["params"]]
    return adamw(groups, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps)
