"""Means over seeds with 95 % intervals, paired differences, and the verdict on an effect."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    half_width: float | None
    """Half of the interval's width; None for a single value, which has no interval."""
    count: int
    """Number of values."""

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width


def t_quantile(confidence: float, degrees: int) -> float:
    """Return t such that Student's distribution has this probability between -t and t."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _central_probability(angle, degrees) < confidence else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _central_probability(angle: float, degrees: int) -> float:
    """Return the probability between -t and t with t = tan(angle) * sqrt(degrees).

    For whole degrees it is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    odd = degrees % 2
    term, total = math.cos(angle) ** odd, 0.0
    for j in range(odd, degrees - 1, 2):
        total += term
        term *= (j + 1) / (j + 2) * math.cos(angle) ** 2
    area = math.sin(angle) * total
    return (angle + area) * 2 / math.pi if odd else area


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of the values, each of another seed, with Student's interval."""
    count = len(values)
    if count < 2:
        return Interval(fmean(values), None, count)
    half_width = t_quantile(CONFIDENCE, count - 1) * stdev(values) / math.sqrt(count)
    return Interval(fmean(values), half_width, count)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """Return the interval of values - baseline over the seeds that both have; None if there are none."""
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    return interval(differences) if differences else None


AS_IN_PAPER, NOT_AS_IN_PAPER, NOT_TESTED = "as in the paper", "not as in the paper", "not tested"


def verdict(
    difference: Interval | None, effect: float | None, learned: bool, room: float = math.inf
) -> tuple[str, str]:
    """Return the verdict on the paper's effect and its reason.

    learned: whether the baseline learns the task in one cell at least. room: the best possible difference. An interval
    that could not have seen half the effect tests nothing, also if it happens to exclude 0: such a difference is mostly
    noise.
    """
    if not effect:
        return NOT_TESTED, "the paper has no such comparison"
    if not learned:
        return NOT_TESTED, "the baseline learns the task in no cell"
    if difference is None or difference.half_width is None:
        return NOT_TESTED, "an interval needs two seeds"
    if room < abs(effect) / 2:
        return NOT_TESTED, "the baseline leaves no room for half of the effect"
    if difference.half_width > abs(effect) / 2:
        return NOT_TESTED, "the interval is too wide to see half of the effect"
    if not difference.excludes_zero:
        return NOT_AS_IN_PAPER, "no difference beyond the interval"
    if difference.mean * effect < 0:
        return NOT_AS_IN_PAPER, "a difference in the other direction"
    return AS_IN_PAPER, "the difference is beyond the interval"
