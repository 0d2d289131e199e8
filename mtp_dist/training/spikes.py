"""Noticing that the loss jumps."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean

WINDOW = 128
"""Steps that a loss is compared with; before there are as many nothing counts as a spike."""


class SpikeDetector:
    """Compares head 1's loss, which every schedule trains, with its mean over the last WINDOW steps."""

    def __init__(self, deviations: float | None) -> None:
        """deviations: how many standard deviations above the mean is a spike; None: nothing is."""
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)

    @property
    def losses(self) -> list[float]:
        """What the next loss is compared with, oldest first. A checkpoint has them."""
        return list(self._losses)

    def restore(self, losses: Sequence[float]) -> None:
        """Be as after these."""
        self._losses = deque(losses, maxlen=WINDOW)

    def take(self, loss: float | None) -> str | None:
        """Take in the next step's loss, which is finite, or None if it has none. Returns what to say where it is a
        spike."""
        if loss is None:
            return None
        if self._deviations is None or len(self._losses) < WINDOW:
            self._losses.append(loss)
            return None
        mean = fmean(self._losses)
        deviation = math.sqrt(fmean((earlier - mean) ** 2 for earlier in self._losses))
        highest = mean + self._deviations * deviation
        # As itself a spike would hide the next one; left out, a loss that stays higher would be a spike for ever.
        self._losses.append(min(loss, highest))
        if loss <= highest:
            return None
        return f"head 1's loss is {loss:.4f}, that of the {WINDOW} steps before {mean:.4f} +- {deviation:.4f}"
