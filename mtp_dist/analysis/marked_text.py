"""A text with marked choices, and the parts of the loss that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mtp_dist.errors import DataError


class Mark(IntEnum):
    """Kind of a token."""

    INCONSEQUENTIAL = 0
    CHOICE = 1
    DETERMINED = 2
    """Determined by the last choice."""
    OTHER = 3
    """The end of a document, say, whose loss terms are not counted."""


class Part(IntEnum):
    """Kind of a loss term."""

    CHOICE = 0
    """A choice, or a token that it determines, at a position before the choice."""
    KNOWN = 1
    """A token determined by a choice, at a position that reads the choice."""
    INCONSEQUENTIAL = 2


IGNORED = -1
"""Part of the terms that are not counted."""


class MarkedText(NamedTuple):
    """A text and the kind of each of its tokens."""

    tokens: NDArray[np.integer]
    marks: NDArray[np.uint8]
    """A `Mark` per token."""


class TermLabels(NamedTuple):
    """Kinds of the loss terms of one batch, and distances of its positions and targets from the last choice."""

    parts: Tensor
    """A `Part` or IGNORED per term, `[n, B, S]`."""
    offsets: Tensor
    """Distance of each term's target from the last choice, `[n, B, S]`."""
    counted: Tensor
    """True if all terms of a position are counted, `[B, S]`."""
    next_marks: Tensor
    """The `Mark` of each position's next token, `[B, S]`."""
    since_choice: Tensor
    """Distance of each position from the last choice, `[B, S]`."""


class TextTerms:
    """The loss terms of a marked text."""

    def __init__(self, marks: NDArray[np.uint8], positions: int, distances: Sequence[int]) -> None:
        """positions: number of them whose losses are measured. Raise DataError if no choice has all its terms there."""
        self.distances, reach = distances, distances[-1]
        self.marks = torch.as_tensor(marks[: positions + reach].astype(np.int64))
        self.index = torch.arange(len(self.marks))
        self.choice = torch.where(self.marks == Mark.CHOICE, self.index, -1).cummax(0).values
        """Position of the last choice up to each token."""
        from_choice = (self.marks == Mark.CHOICE) | (self.marks == Mark.DETERMINED)
        owner = torch.where(from_choice, self.choice, self.index)
        last = torch.where(from_choice, owner + reach - 1, owner)
        others = F.pad((self.marks == Mark.OTHER).cumsum(0), (1, 0))
        between = others[last.clamp(max=positions) + 1] - others[(owner - reach).clamp(min=0)]
        self.counted = (owner >= reach) & (last <= positions) & (between == 0)
        """True if all terms of a token, or of the choice that it belongs to, are at the measured positions, and no
        `Mark.OTHER` is among their positions and targets."""
        self.choices, self.inconsequential = self._count(Mark.CHOICE), self._count(Mark.INCONSEQUENTIAL)
        if not self.choices:
            raise DataError("the text has no choice point with all its loss terms: raise --tokens")

    def _count(self, mark: Mark) -> int:
        return int(((self.marks == mark) & self.counted).sum())

    def labels(self, start: int, shape: torch.Size, device: torch.device) -> TermLabels:
        """Return the labels of the terms of successive positions from `start` on, in a batch of that shape."""
        stop = start + shape.numel()
        positions, parts, offsets = self.index[start:stop], [], []
        for distance in self.distances:
            target = slice(start + distance, stop + distance)
            part = torch.where(positions < self.choice[target], Part.CHOICE, Part.KNOWN)
            part = part.masked_fill(self.marks[target] == Mark.INCONSEQUENTIAL, Part.INCONSEQUENTIAL)
            parts.append(part.masked_fill(~self.counted[target], IGNORED).view(shape))
            offsets.append((self.index[target] - self.choice[target]).view(shape))
        stacked = torch.stack(parts)
        next_marks, since_choice = self.marks[start + 1 : stop + 1], positions - self.choice[start:stop]
        labels = (
            stacked,
            torch.stack(offsets),
            (stacked != IGNORED).all(0),
            next_marks.view(shape),
            since_choice.view(shape),
        )
        return TermLabels(*(label.to(device) for label in labels))
