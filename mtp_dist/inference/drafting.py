"""Drafts of the next tokens from heads 2..n, and the hidden states that these heads have yet to read.

A head with transformer layers must run at every position, since later positions attend to its keys and values. It runs
when it drafts, at all positions since it last did, so heads that are not used for a while cost nothing meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtp_dist.config import HeadsConfig
from mtp_dist.config.heads import drafting_head
from mtp_dist.inference.cache import PositionCache
from mtp_dist.inference.spans import Span, causal_span, overlapping_span

if TYPE_CHECKING:
    from mtp_dist.inference.model import MTPForCausalLM


def draft_sources(heads: HeadsConfig) -> dict[int, tuple[int, int]]:
    """Return how the token at each distance from 2 on is drafted: by which head, and how many positions earlier.

    A distance that no head has is drafted by the next larger one, at an earlier position: with distances 1, 3, 5 the
    token 2 positions ahead is 3 ahead of the previous position.
    """
    sources = {}
    for distance in range(2, heads.distances[-1] + 1):
        head = drafting_head(heads.distances, distance)
        sources[distance] = (head, heads.distances[head - 1] - distance)
    return sources


@dataclass
class DraftState:
    """The input of the heads that draft the tokens after one position of each row, and their results."""

    token_ids: Tensor
    """`[B, T]`: the text of each row by position, and the drafts after it."""
    last: Tensor
    """`[B]`: the last position whose trunk output is known. Head k predicts the token k positions after it."""
    features: Tensor
    """`[B, m, F]`: hidden states that the heads read, at the last m positions."""
    span: Span
    """These positions."""
    cache: PositionCache
    longest: int
    """Largest distance to draft."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines `[B, m, head_dim]` of the span's rotary embedding, once a head with layers has run."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """`[B, m, D]`: hidden states before the final norm of the heads that have run, by head."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    """`[B, V]`: logits that are known, by distance."""


def draft(model: MTPForCausalLM, distance: int, state: DraftState, previous_token: Tensor) -> Tensor:
    """Return logits `[B, V]` for the token `distance` positions after the last one.

    previous_token: `[B]`, the one before it, which `sequential` heads and heads with a condition read.
    """
    state.token_ids.scatter_(1, (state.last + distance - 1)[:, None], previous_token[:, None])
    if model.draft_condition:
        return draft_after_each(model, distance, state, previous_token[:, None]).squeeze(1)
    return _unconditioned_logits(model, distance, state)


def draft_after_each(model: MTPForCausalLM, distance: int, state: DraftState, previous_tokens: Tensor) -> Tensor:
    """Return logits `[B, p, V]` of a head with a condition for the token `distance` positions after the last one.

    previous_tokens: `[B, p]`, candidates for the token before it.
    """
    head, _ = draft_sources(model.heads)[distance]
    logits = _unconditioned_logits(model, distance, state)[:, None]
    return logits + model.condition_logits(head, previous_tokens)


def _unconditioned_logits(model: MTPForCausalLM, distance: int, state: DraftState) -> Tensor:
    if distance not in state.logits:
        # Blocks that read no tokens run at once, so that the unembedding that they share is read once.
        last = distance if model.heads.traits.embeds_tokens else state.longest
        sources = draft_sources(model.heads)
        heads, offsets = zip(*(sources[ahead] for ahead in range(distance, last + 1)), strict=True)
        hidden = [head_hidden(model, head, state) for head in heads]
        places = [max(0, state.features.shape[1] - 1 - offset) for offset in offsets]
        at_places = [states[:, place] for states, place in zip(hidden, places, strict=True)]
        logits = model.draft_logits(heads, torch.stack(at_places, 1))
        state.logits |= dict(enumerate(logits.unbind(1), distance))
    return state.logits[distance]


def head_hidden(model: MTPForCausalLM, k: int, state: DraftState) -> Tensor:
    """Return the hidden states `[B, m, D]` of head k, after those that it reads."""
    if k not in state.hidden:
        traits, before, embedded = model.heads.traits, state.features, None
        if traits.reads == "previous head" and k > 2:
            before = head_hidden(model, k - 1, state)
        if traits.embeds_tokens:
            read = state.token_ids.gather(1, state.span.positions + k - 1)
            embedded = model.model.embed_tokens(read)
        state.hidden[k] = model.draft_hidden(k, before, embedded, state)
    return state.hidden[k]


class DraftInput:
    """Hidden states that the heads read, from the first position that one of them has yet to process.

    They are aligned at each row's last position. A row that has fewer positions than another contains its first one
    several times, which does no harm: the same hidden states give the same keys and values.
    """

    def __init__(self, model: MTPForCausalLM, cache: PositionCache, max_distance: int) -> None:
        """max_distance: largest distance that will be drafted."""
        heads = model.heads
        self.cache, self.longest = cache, max_distance
        self.sources = draft_sources(heads)
        used = [self.sources[distance] for distance in range(2, max_distance + 1)]
        self.num_heads = max((head for head, _ in used), default=1)
        # Positions that must be processed again: those whose blocks have read drafts instead of the true tokens, and
        # those from which earlier positions' heads draft.
        self.overlap = (
            max(0, self.num_heads - 2) if heads.traits.embeds_tokens else max((o for _, o in used), default=0)
        )
        self.keeps_state = model.num_draft_layers > 0
        self.unread = dict.fromkeys(range(2, self.num_heads + 1), 0)
        """Number of last positions that each head has yet to process."""
        self.features: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.consecutive = True
        """True if the positions of each row are consecutive and the same."""

    def append(self, features: Tensor, positions: Tensor, counts: Tensor, host_counts: Sequence[int]) -> None:
        """Add the first `counts[b]` of the q new positions of each row, `[B, q, F]` and `[B, q]`."""
        if self.num_heads == 1:
            return
        most = max(host_counts)
        self.consecutive = self.consecutive and min(host_counts) == most
        if min(host_counts) == most:
            self._set([*self.features, features[:, :most]], [*self.positions, positions[:, :most]])
        else:
            self._append_ragged(features, positions, counts, most)
        for head in self.unread:
            self.unread[head] += most

    def _append_ragged(self, features: Tensor, positions: Tensor, counts: Tensor, most: int) -> None:
        before = sum(chunk.shape[1] for chunk in self.positions)
        features, positions = torch.cat([*self.features, features], 1), torch.cat([*self.positions, positions], 1)
        columns = torch.arange(-most - before, 0, device=positions.device)
        index = (before + counts[:, None] + columns).clamp(min=0)
        self._set(
            [features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))], [positions.gather(1, index)]
        )

    def _set(self, features: list[Tensor], positions: list[Tensor]) -> None:
        self.features, self.positions = features, positions
        if not self.keeps_state:
            self._keep_last(self.overlap + 1)

    def _keep_last(self, count: int) -> None:
        features, positions = torch.cat(self.features, 1), torch.cat(self.positions, 1)
        start = max(0, positions.shape[1] - count)
        self.features, self.positions = [features[:, start:]], [positions[:, start:]]

    def is_behind(self, max_distance: int) -> bool:
        """Return whether drafts up to a distance need a head that has more to read than one forward pass can add."""
        heads = {self.sources[distance][0] for distance in range(2, max_distance + 1)}
        return self.keeps_state and max((self.unread[head] for head in heads), default=0) > self.longest

    def stop(self) -> None:
        """Collect no more: there will be no further drafts."""
        self.num_heads, self.features, self.positions = 1, [], []

    def keep(self, indices: Tensor) -> None:
        """Remove all but these rows of the batch."""
        self.features = [features[indices] for features in self.features]
        self.positions = [positions[indices] for positions in self.positions]

    def state(self, token_ids: Tensor, max_distance: int, last: int) -> DraftState:
        """Return what the heads need to draft up to a distance. last: largest position of any row."""
        features, positions = torch.cat(self.features, 1), torch.cat(self.positions, 1)
        heads = range(2, max(self.sources[distance][0] for distance in range(2, max_distance + 1)) + 1)
        unread = max(self.unread[head] for head in heads) if self.keeps_state else 1
        window = min(unread + self.overlap, positions.shape[1])
        for head in heads:
            self.unread[head] = 0
        self._keep_last(max(self.unread.values()) + self.overlap)
        features, positions = features[:, -window:], positions[:, -window:]
        if self.consecutive:
            span = causal_span(positions, [last + 1 - window])
        else:
            span = overlapping_span(positions, last + 1)
        return DraftState(token_ids, positions[:, -1], features, span, self.cache, max_distance)
