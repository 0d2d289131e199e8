"""Noticing that the loss jumps."""

import statistics
from collections import deque

WINDOW = 128
"""Steps that a loss is compared with; before there are as many nothing counts as a spike."""


class SpikeDetector:
    """Compares head 1's loss, which every schedule trains, with its mean over the last WINDOW steps."""

    def __init__(self, deviations: float | None) -> None:
        """deviations: how many standard deviations above the mean is a spike; None: nothing is."""
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def spike(self, loss: float) -> str | None:
        """What to say of the next step's loss, which is finite, where it is one. No later loss is compared with it."""
        if self._deviations is not None and len(self._losses) == WINDOW:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + self._deviations * deviation:
                return f"head 1's loss is {loss:.4f}, that of the {WINDOW} steps before {mean:.4f} +- {deviation:.4f}"
        self._losses.append(loss)
        return None
