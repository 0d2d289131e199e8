"""The number of tokens to draft, chosen while decoding from measured times and acceptance."""

from collections import deque
from collections.abc import Mapping, Sequence

RECENT_PASSES = 9
"""Forward passes of each length whose shortest time counts: other work on the machine only adds to it."""
MEMORY = 0.98
"""Weight of all earlier drafts relative to the next one in the measured acceptance."""
PRIOR_ACCEPTANCE, PRIOR_DRAFTS = 0.8, 4
"""Acceptance assumed at each distance before any is measured, and the number of drafts that it counts as."""
TRIALS = 2
"""Forward passes of each length that is tried before any is preferred."""
LEAST_TRIAL_SPEED = 0.9
"""Speed of a tried length, relative to plain decoding, below which no larger one is tried."""
FIRST_PROBE_AFTER, LAST_PROBE_AFTER = 16, 1024
"""Forward passes between trials of lengths next to the best one; doubled after each trial."""
LEAST_SPEED = 1.05
"""Least speed, relative to plain decoding, with which drafts pay: the estimate is of the best of several lengths."""
LOSING_PASSES, LOSING_DRAFTS = 3, 12
"""Least numbers of passes in a row, and of drafts at distance 2 in them, after which drafts that do not pay end."""
FIRST_RETRY_AFTER = 4
"""Calls without drafts before the next trial; doubled after each trial."""
COMPARED_PASSES = 8
"""Forward passes from which on the texts of a batch are compared with each other."""
SMALL_PASS = 16
"""Tokens in a forward pass that hardly take longer than one, on any machine."""
MIN_GAIN = 1.1
"""Least speed-up, at the rate at which the prompt was read, that is worth a trial."""


class MeasuredAcceptance:
    """Fraction of the drafts that were accepted, by distance, of those whose predecessors were."""

    def __init__(self, longest: int) -> None:
        self.reached = dict.fromkeys(range(2, longest + 1), float(PRIOR_DRAFTS))
        self.accepted = dict.fromkeys(range(2, longest + 1), PRIOR_ACCEPTANCE * PRIOR_DRAFTS)

    def record(self, length: int, accepted: Sequence[int]) -> None:
        """Count a forward pass with drafts up to distance `length`, of which each text accepted that many."""
        for distance in range(2, length + 1):
            reached = sum(count >= distance - 2 for count in accepted)
            self.reached[distance] = MEMORY * self.reached[distance] + reached
            self.accepted[distance] = MEMORY * self.accepted[distance] + sum(n >= distance - 1 for n in accepted)

    def expected_tokens(self) -> Mapping[int, float]:
        """Return the expected tokens of a forward pass by its length."""
        expected, probability = {1: 1.0}, 1.0
        for distance, reached in self.reached.items():
            probability *= self.accepted[distance] / reached
            expected[distance] = expected[distance - 1] + probability
        return expected


class AdaptiveLength:
    """Choice of the number of tokens per forward pass, for batches of about the same number of texts.

    A call first measures plain passes, then lengths from 2 to the longest, unless an earlier call has: every further
    head must first read the whole prompt. After that the length with the most tokens per second is used. Drafts that do
    not pay end for the rest of the call, because the heads would have to read all positions since: what one call has
    measured decides whether the next one drafts.
    """

    def __init__(self, longest: int, acceptance: MeasuredAcceptance) -> None:
        self.longest, self.acceptance = longest, acceptance
        self.seconds: dict[int, deque[float]] = {}
        self.drafting = True
        """True until drafts do not pay in this call."""
        self.calls_without, self.retry_after = 0, FIRST_RETRY_AFTER
        self.gains: list[int] = []
        """Accepted drafts of each text, in the last passes of this call that had the same texts."""
        self.gain_passes = 0
        """Number of these passes."""
        self.slowest = 1.0
        """Accepted drafts of the text with the fewest, as a fraction of the mean."""
        self.begin(1, 1, 0.0)

    def begin(self, rows: int, prompt_tokens: int, prompt_seconds: float) -> None:
        """Start a call. prompt_tokens, prompt_seconds: those of all `rows` prompts, read in one forward pass."""
        self.rows, self.seconds_per_token = rows, prompt_seconds / prompt_tokens
        self.passes, self.losing, self.gains = 0, 0, []
        self.next_probe, self.probe_after = FIRST_PROBE_AFTER, FIRST_PROBE_AFTER
        self.probe, self.probes_left = 1, 0
        if self.drafting or (self._tried(2) and self._speed(self.best()) >= LEAST_SPEED):
            self.drafting = True
            return
        self.calls_without += 1
        if self.calls_without >= self.retry_after:
            self.calls_without, self.retry_after = 0, 2 * self.retry_after
            self.drafting = True

    def choose(self) -> int:
        """Return the length of the next forward pass."""
        if not self.drafting:
            return 1
        if self._tried(1) < TRIALS:
            return 1
        if self.passes <= TRIALS and not self._promising():
            self.drafting = False
            return 1
        if self._tried(self.longest) < TRIALS:
            for length in sorted({2, (self.longest + 1) // 2, self.longest}):
                if self._tried(length) < TRIALS:
                    return length
                if self._speed(length) < LEAST_TRIAL_SPEED:
                    break
        best = self.best()
        self.losing = 0 if self._speed(best) >= LEAST_SPEED else self.losing + 1
        if self.losing >= LOSING_PASSES and self.losing * self.rows >= LOSING_DRAFTS:
            self.drafting = False
            return 1
        return self._probe_or(best)

    def _probe_or(self, best: int) -> int:
        """Return the best length, or now and then twice in a row another one: the first time more heads catch up."""
        if self.passes >= self.next_probe:
            others = [length for length in (1, best - 1, best + 1) if length <= self.longest]
            if self._tried(self.longest) and self._speed(self.longest) >= LEAST_TRIAL_SPEED:
                others.append(self.longest)  # for which all heads catch up
            self.next_probe, self.probe_after = (
                self.passes + self.probe_after,
                min(2 * self.probe_after, LAST_PROBE_AFTER),
            )
            self.probe, self.probes_left = min(others, key=self._tried), 2
        if not self.probes_left:
            return best
        self.probes_left -= 1
        return self.probe

    def best(self) -> int:
        """Return the length with the most tokens per second of those with drafts."""
        expected, costs = self.acceptance.expected_tokens(), self._costs()
        return max(range(2, max(costs) + 1), key=lambda length: expected[length] / costs[length])

    def record(self, length: int, seconds: float, accepted: Sequence[int], up_to_date: bool) -> None:
        """Record the time of a forward pass, and the number of accepted drafts of each text.

        up_to_date: False if the heads also read positions of earlier passes.
        """
        self.passes += 1
        if up_to_date:
            self.seconds.setdefault(length, deque(maxlen=RECENT_PASSES)).append(seconds)
        self.acceptance.record(length, accepted)
        if length > 1:
            self._compare(accepted)

    def _compare(self, accepted: Sequence[int]) -> None:
        if len(self.gains) != len(accepted):  # a text has ended
            self.gains, self.gain_passes = [0] * len(accepted), 0
        self.gains, self.gain_passes = [*map(sum, zip(self.gains, accepted, strict=True))], self.gain_passes + 1
        if self.gain_passes >= COMPARED_PASSES:
            self.slowest = min(self.gains) * len(self.gains) / max(1, sum(self.gains))

    def _tried(self, length: int) -> int:
        return len(self.seconds.get(length, ()))

    def _speed(self, length: int) -> float:
        """Return the speed, relative to plain decoding, of the text that accepts the fewest drafts.

        It decides when the batch ends.
        """
        costs, accepted = self._costs(), self.acceptance.expected_tokens()[length] - 1
        return (1 + accepted * self.slowest) * costs[1] / costs[length]

    def _promising(self) -> bool:
        """Return whether drafts could pay if a pass took as long per token as the prompts did, or as a plain one."""
        plain = min(self.seconds[1])
        gains = [
            tokens / max(1.0, self.rows * length * self.seconds_per_token / plain)
            for length, tokens in self.acceptance.expected_tokens().items()
            if length > 1
        ]
        return self.rows * self.longest <= SMALL_PASS or max(gains) >= MIN_GAIN

    def _costs(self) -> Mapping[int, float]:
        """Return the seconds per forward pass by length, linear between the measured lengths."""
        measured = {length: min(times) for length, times in sorted(self.seconds.items())}
        costs = {}
        for length in range(1, max(measured) + 1):
            below, above = max(n for n in measured if n <= length), min(n for n in measured if n >= length)
            share = (length - below) / (above - below) if above > below else 0.0
            costs[length] = measured[below] + share * (measured[above] - measured[below])
        return costs
