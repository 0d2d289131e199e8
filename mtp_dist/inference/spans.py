"""Positions of the tokens of one forward pass, and what each of them attends to.

A row's tokens begin at position 0 whatever its padding, and the keys and values of a position are in the cache's slot
of that number. Rows of different lengths therefore need no padding mask, and discarding rejected drafts is free: the
next tokens overwrite their slots, which no position before them attends to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.inference.tree import DraftTree


@dataclass(frozen=True)
class Span:
    """The q tokens of each row in one forward pass."""

    positions: Tensor
    """`[B, q]`, for the rotary embedding."""
    slots: Tensor
    """`[B, q]`: slots of the cache to write."""
    first_slot: int | None
    """First slot if those of all rows are the same consecutive ones."""
    end: int
    """Number of slots that the tokens attend to."""
    mask: Tensor | None
    """`[B or 1, 1, q, end]`, True if a token attends to a slot; None if each attends to all up to its own."""

    def mask_within(self, window: int | None) -> Tensor | None:
        """Return `mask`, and nothing attended to that is `window` positions or more before the token."""
        if window is None:
            return self.mask
        slots = torch.arange(self.end, device=self.positions.device)
        mask = (slots <= self.positions[..., None])[:, None] if self.mask is None else self.mask
        # The drafts of a tree are in slots that are not their positions.
        in_slots = slots.repeat(len(self.positions), 1).scatter(1, self.slots, self.positions)
        return mask & (self.positions[..., None] - in_slots[:, None] < window)[:, None]


def causal_span(positions: Tensor, firsts: Sequence[int]) -> Span:
    """Return the span of consecutive positions `[B, q]`, which begin with `firsts`."""
    length = positions.shape[1]
    return _span(positions, max(firsts) + length, firsts[0] if min(firsts) == max(firsts) else None)


def overlapping_span(positions: Tensor, end: int) -> Span:
    """Return the span of positions `[B, q]` below `end`, of which a row may contain some more than once."""
    return _span(positions, end, None)


def _span(positions: Tensor, end: int, first: int | None) -> Span:
    if first is not None and (first == 0 or positions.shape[1] == 1):
        return Span(positions, positions, first, end, None)
    slots = torch.arange(end, device=positions.device)
    return Span(positions, positions, first, end, (slots <= positions[..., None])[:, None])


def tree_span(starts: Tensor, firsts: Sequence[int], tree: DraftTree) -> Span:
    """Return the span of a tree of N drafts per row, whose nodes are in consecutive slots from `starts` `[B]` on.

    firsts: the same numbers on the host.
    """
    device, size = starts.device, len(tree.parents)
    end = max(firsts) + size
    offsets = torch.arange(end, device=device) - starts[:, None]
    in_tree = tree.ancestors.to(device)[:, offsets.clamp(0, size - 1)].transpose(0, 1) & (offsets < size)[:, None]
    mask = (offsets < 0)[:, None] | in_tree
    slots = starts[:, None] + torch.arange(size, device=device)
    first = firsts[0] if min(firsts) == max(firsts) else None
    return Span(starts[:, None] + torch.tensor(tree.depths, device=device), slots, first, end, mask[:, None])
