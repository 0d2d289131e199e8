"""Loss weights and active heads of every training step."""

from dataclasses import dataclass

from mtp_dist.config import Config, HeadsConfig
from mtp_dist.config.base import value_at_step


@dataclass(frozen=True)
class HeadSchedule:
    """Loss weights and active heads of one step."""

    loss_weights: tuple[float, ...]
    """Weight w_k of each head's loss, head 1 first."""
    active_heads: int
    """Heads 1..active_heads are trained; the others do not run."""


def head_schedule(config: Config, step: int) -> HeadSchedule:
    """Return the loss weights and active heads of a step, counted from 1."""
    return HeadSchedule(_loss_weights(config.heads, step), _active_heads(config, step))


def _loss_weights(heads: HeadsConfig, step: int) -> tuple[float, ...]:
    if heads.auxiliary_weight is not None:
        others = heads.count - 1
        return (1.0, *(value_at_step(heads.auxiliary_weight, step) / others,) * others)
    if heads.loss_decay is not None:
        powers = [heads.loss_decay ** (k - 1) for k in range(1, heads.count + 1)]
        return tuple(power / sum(powers) for power in powers)
    return heads.loss_weights or (1.0,) * heads.count


def _active_heads(config: Config, step: int) -> int:
    """Return how many heads run: n equal stages that add or drop one head each (arXiv:2505.22757)."""
    count, schedule = config.heads.count, config.heads.schedule
    stage = (step - 1) * count // config.train.steps
    if schedule == "forward":
        return stage + 1
    return count - stage if schedule == "reverse" else count
