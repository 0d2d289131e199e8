"""Detection of loss spikes."""

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean

WINDOW = 128
"""Steps whose mean a loss is compared with; until the window is full no loss is a spike."""


class SpikeDetector:
    """Detector of losses of head 1, which every schedule trains, far above their mean over the last WINDOW steps."""

    def __init__(self, deviations: float | None) -> None:
        """Detect losses more than this many standard deviations above the mean; None: detect none."""
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)

    @property
    def losses(self) -> list[float]:
        """Losses that the next one is compared with, oldest first. A checkpoint contains them."""
        return list(self._losses)

    def restore(self, losses: Sequence[float]) -> None:
        """Continue after these losses."""
        self._losses = deque(losses, maxlen=WINDOW)

    def update(self, loss: float | None) -> str | None:
        """Add the next step's finite loss, or None if head 1 had no target. Describe the spike if it is one."""
        if loss is None:
            return None
        if self._deviations is None or len(self._losses) < WINDOW:
            self._losses.append(loss)
            return None
        mean = fmean(self._losses)
        deviation = math.sqrt(fmean((earlier - mean) ** 2 for earlier in self._losses))
        highest = mean + self._deviations * deviation
        # Clipped: as it is a spike would mask the next one; left out, a lasting rise would be reported forever.
        self._losses.append(min(loss, highest))
        if loss <= highest:
            return None
        return f"head 1's loss is {loss:.4f}, the mean of the {WINDOW} steps before is {mean:.4f} +- {deviation:.4f}"
