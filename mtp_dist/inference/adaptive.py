"""The number of tokens to draft, chosen while decoding."""

from collections import deque
from collections.abc import Mapping, Sequence

RECENT_PASSES = 9
"""Forward passes of each length whose shortest time counts: other work on the machine only adds to it."""
MEMORY = 0.98
"""Weight of all earlier drafts relative to the next one in the measured acceptance."""
FIRST_TRIALS = 2
"""Forward passes of the longest, a middle and the shortest length before any is preferred."""
FIRST_PROBE_AFTER, LAST_PROBE_AFTER = 16, 1024
"""Forward passes between trials of another length than the best one; doubled after each that is not better."""


class AdaptiveLength:
    """Choice of the number of tokens per forward pass, between 1 and a maximum, with the most tokens per second.

    It measures the acceptance at each distance and the time of a forward pass at each length. It first tries the
    longest, a middle and the shortest one; later it tries others now and then.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.seconds: dict[int, deque[float]] = {}
        self.reached = dict.fromkeys(range(2, longest + 1), 0.0)
        self.accepted = dict.fromkeys(range(2, longest + 1), 0.0)
        self.passes = 0
        self.next_probe, self.probe_after = FIRST_PROBE_AFTER, FIRST_PROBE_AFTER

    def choose(self) -> int:
        """Return the length of the next forward pass."""
        for length in (self.longest, (self.longest + 1) // 2, 1):
            if len(self.seconds.get(length, ())) < FIRST_TRIALS:
                return length
        best = self.best()
        if self.passes >= self.next_probe:
            self.next_probe = self.passes + self.probe_after
            self.probe_after = min(2 * self.probe_after, LAST_PROBE_AFTER)
            others = [length for length in (best + 1, best - 1, self.longest) if 1 <= length <= self.longest]
            return min(others, key=lambda length: len(self.seconds.get(length, ())))
        return best

    def best(self) -> int:
        """Return the length with the most tokens per second."""
        expected = self._expected_tokens()
        costs = self._costs()
        return max(range(1, self.longest + 1), key=lambda length: expected[length] / costs[length])

    def record(self, length: int, seconds: float, accepted: Sequence[int]) -> None:
        """Record the time of a forward pass, and the number of accepted drafts of each unfinished text."""
        self.passes += 1
        self.seconds.setdefault(length, deque(maxlen=RECENT_PASSES)).append(seconds)
        for distance in range(2, length + 1):
            reached = sum(count >= distance - 2 for count in accepted)
            self.reached[distance] = MEMORY * self.reached[distance] + reached
            self.accepted[distance] = MEMORY * self.accepted[distance] + sum(n >= distance - 1 for n in accepted)

    def _expected_tokens(self) -> Mapping[int, float]:
        expected, probability = {1: 1.0}, 1.0
        for distance in range(2, self.longest + 1):
            probability *= self.accepted[distance] / self.reached[distance] if self.reached[distance] else 0.0
            expected[distance] = expected[distance - 1] + probability
        return expected

    def _costs(self) -> Mapping[int, float]:
        """Return the seconds per forward pass by length, linear between the measured lengths."""
        measured = {length: min(times) for length, times in sorted(self.seconds.items())}
        costs = {}
        for length in range(1, self.longest + 1):
            below, above = max(n for n in measured if n <= length), min(n for n in measured if n >= length)
            share = (length - below) / (above - below) if above > below else 0.0
            costs[length] = measured[below] + share * (measured[above] - measured[below])
        return costs
