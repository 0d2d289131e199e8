"""How much each head's loss counts at each step."""

from dataclasses import dataclass

from mtp_dist.config import Config, HeadsConfig


@dataclass(frozen=True)
class HeadWeights:
    """Of one update."""

    weights: tuple[float, ...]
    """w_k of each head's loss, head 1 first."""
    active: int
    """Heads 1..this learn; the others do not run."""


def head_weights(config: Config, step: int) -> HeadWeights:
    """Of update number `step`, counted from 1."""
    return HeadWeights(_loss_weights(config.heads, step), _active_heads(config, step))


def _loss_weights(heads: HeadsConfig, step: int) -> tuple[float, ...]:
    if heads.auxiliary_weight is not None:
        others = heads.count - 1
        return (1.0, *(_at_step(heads.auxiliary_weight, step) / others,) * others)
    if heads.loss_decay is not None:
        powers = [heads.loss_decay ** (k - 1) for k in range(1, heads.count + 1)]
        return tuple(power / sum(powers) for power in powers)
    return heads.loss_weights or (1.0,) * heads.count


def _at_step(values: float | tuple[tuple[int, float], ...], step: int) -> float:
    """A number, or the last of the (first step, number) pairs that has begun."""
    if not isinstance(values, tuple):
        return values
    return [value for first, value in values if first <= step][-1]


def _active_heads(config: Config, step: int) -> int:
    """n equal stages with one head more (`forward`) or less (`reverse`) in each (arXiv:2505.22757)."""
    count, schedule = config.heads.count, config.heads.schedule
    stage = (step - 1) * count // config.train.steps
    if schedule == "forward":
        return stage + 1
    return count - stage if schedule == "reverse" else count
