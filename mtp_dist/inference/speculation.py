"""Options of drafting, and the counts that a generation reports besides its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mtp_dist.inference.tree import DraftTree


@dataclass
class DecodingStatistics:
    """Counts over all texts of one or more calls of `generate`."""

    tokens: int = 0
    """New tokens."""
    forward_passes: int = 0
    """Forward passes of the trunk, the prompt's included, counted once per text that was unfinished."""
    seconds: float = 0.0
    drafted: dict[int, int] = field(default_factory=dict)
    """Drafts whose predecessors were all accepted, by distance."""
    accepted: dict[int, int] = field(default_factory=dict)
    """Accepted drafts by distance."""

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of a text per forward pass."""
        return self.tokens / self.forward_passes if self.forward_passes else 0.0

    @property
    def acceptance(self) -> dict[int, float]:
        """Fraction of the drafts that were accepted, by distance, of those whose predecessors were accepted."""
        return {distance: self.accepted.get(distance, 0) / count for distance, count in sorted(self.drafted.items())}

    def count(self, longest: int, accepted: int, tokens: int) -> None:
        """Count a forward pass of one text that verified drafts at distances 2..longest."""
        self.tokens += tokens
        self.forward_passes += 1
        for distance in range(2, min(longest, accepted + 2) + 1):
            self.drafted[distance] = self.drafted.get(distance, 0) + 1
            if distance <= accepted + 1:
                self.accepted[distance] = self.accepted.get(distance, 0) + 1


@dataclass
class Speculation:
    """Options of drafting, and the counts of what came of it."""

    heads: int | None = None
    """Number of heads that predict, head 1 included: 1 is plain decoding. By default as many as are fastest, which is
    measured while decoding."""
    tree: DraftTree | None = None
    """Candidates to verify instead of the most probable token of each head."""
    on_tokens: Callable[[int, Sequence[int], int], None] | None = None
    """Called with a row of the batch, its next tokens, and how many of the first ones are accepted drafts."""
    statistics: DecodingStatistics = field(default_factory=DecodingStatistics)
