"""Predictions after continuations of a text that share its keys and values.

The text of a window is read once. A branch is a continuation of the text up to some position; each forward pass adds
one token to many branches, of one position or of several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mtp_dist.analysis.causal_model import CausalModel
from mtp_dist.model.targets import attention_bias, document_ids

TOKENS_PER_FORWARD = 256
"""Branches that one forward pass extends: enough for efficient matrix products, and each attends to all slots."""
CHECKED_TOKENS = 12
MASK_TOLERANCE = 1e-3
"""Largest difference between log-probabilities that are the same except for rounding."""


class Branches(Protocol):
    """Continuations of a text after G positions."""

    def extend(self, parents: Tensor, tokens: Tensor, *, is_last: bool) -> Iterator[tuple[slice, Tensor]]:
        """Add tokens `[G, K]` to the branches `parents` `[G, K]`, of which there is one per position at first.

        Yield columns of K, and the log-probabilities `[G, columns, V]` of the tokens after them. The new branches
        replace the old ones. is_last: they are not extended again.
        """


class Prefix(Protocol):
    """The text of a window, read once."""

    log_probs: Tensor
    """`[S, V]`: those of the token after each position."""

    def group_size(self, branches: int) -> int:
        """Return how many positions are branched at the same time if each has that many branches."""

    def branch(self, positions: Tensor) -> Branches:
        """Begin new branches after positions `[G]`. Earlier ones can no longer be extended."""


def read_prefix(model: CausalModel, tokens: Tensor, by_mask: bool) -> Prefix:
    """Read the text `[S]` of a window. by_mask: whether the model `attends_by_mask`."""
    return MaskedPrefix(model, tokens) if by_mask else CopiedPrefix(model, tokens)


def attends_by_mask(model: CausalModel) -> bool:
    """Return whether masks and position ids decide alone what a token attends to.

    This is not so for layers with a recurrent state or with a window shorter than the text, and for attention biases
    that depend on the places in the cache instead of the position ids, such as ALiBi.
    """
    for layer in DynamicCache(config=model.network.config).layers:
        is_long = isinstance(layer, DynamicSlidingWindowLayer) and layer.sliding_window > model.window_length
        if type(layer) is not DynamicLayer and not is_long:
            return False
    tokens = torch.arange(CHECKED_TOKENS, device=model.device) % model.tokenizer.vocab_size
    positions = torch.arange(CHECKED_TOKENS - 1, device=model.device)
    try:
        prefix = MaskedPrefix(model, tokens)
        branches = prefix.branch(positions)
        [(_, found)] = branches.extend(torch.zeros_like(positions)[:, None], tokens[1:, None], is_last=True)
    except Exception:  # architectures fail in many ways with a mask of four dimensions
        return False
    return torch.allclose(found[:, 0], prefix.log_probs[1:], rtol=0, atol=MASK_TOLERANCE)


class MaskedPrefix:
    """A text whose branches are tokens of one long row: each attends to its part of the text and to its ancestors."""

    def __init__(self, model: CausalModel, tokens: Tensor) -> None:
        self.network, self.tokens, self.end = model.network, tokens, model.end_of_attention
        self.cache = DynamicCache()  # not the configuration's: windows would remove keys, but are longer than the text
        mask, self.documents = None, None
        if self.end is not None:
            self.documents = document_ids(tokens, self.end)
            mask = attention_bias(self.documents[None], model.network.dtype)
        output = self.network(input_ids=tokens[None], attention_mask=mask, cache=self.cache, use_cache=True)
        self.log_probs = output.logits[0].log_softmax(-1)

    def group_size(self, branches: int) -> int:
        return max(1, TOKENS_PER_FORWARD // branches)

    def branch(self, positions: Tensor) -> MaskedBranches:
        self.crop(len(self.tokens))
        return MaskedBranches(self, positions)

    def crop(self, slots: int) -> None:
        """Remove the keys and values after the first slots."""
        if (surplus := self.cache.get_seq_length() - slots) > 0:
            self.cache.crop(-surplus)

    def visible(self, positions: Tensor) -> Tensor:
        """Return which slots a token after each position attends to, `[G, 1, S]`."""
        slots = torch.arange(len(self.tokens), device=positions.device)
        visible = slots <= positions[:, None]
        if self.documents is not None:
            next_documents = self.documents[positions] + (self.tokens[positions] == self.end)
            visible &= self.documents == next_documents[:, None]
        return visible[:, None]


class MaskedBranches:
    """Branches of a MaskedPrefix. Those that are extended again keep their keys and values behind the text's."""

    def __init__(self, prefix: MaskedPrefix, positions: Tensor) -> None:
        self.prefix, self.positions = prefix, positions
        self.visible = prefix.visible(positions)
        """`[G, K, slots]`: which slots the next token of a branch attends to."""

    def extend(self, parents: Tensor, tokens: Tensor, *, is_last: bool) -> Iterator[tuple[slice, Tensor]]:
        groups, width = tokens.shape
        self.positions = self.positions + 1
        visible = self.visible.gather(1, parents[:, :, None].expand(-1, -1, self.visible.shape[2]))
        first_slot = self.prefix.cache.get_seq_length()
        columns = max(1, TOKENS_PER_FORWARD // groups)
        places = torch.empty_like(tokens)
        for first in range(0, width, columns):
            part = slice(first, min(first + columns, width))
            log_probs = self._forward(tokens[:, part], visible[:, part])
            count = log_probs.shape[0] * log_probs.shape[1]
            slots = self.prefix.cache.get_seq_length()
            places[:, part] = torch.arange(slots - count, slots, device=tokens.device).view(groups, -1)
            if is_last:
                self.prefix.crop(first_slot)
            yield part, log_probs
        if not is_last:
            visible = F.pad(visible, (0, self.prefix.cache.get_seq_length() - first_slot))
            visible.scatter_(2, places[:, :, None], True)
            if self.prefix.end is not None:
                visible &= (tokens != self.prefix.end)[:, :, None]
            self.visible = visible

    def _forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Return the log-probabilities `[G, m, V]` after tokens `[G, m]` that attend to slots `[G, m, slots]`."""
        prefix, (groups, count) = self.prefix, tokens.shape
        slots = prefix.cache.get_seq_length()
        rows = F.pad(visible, (0, slots - visible.shape[2])).flatten(0, 1)
        seen = torch.cat([rows, torch.eye(len(rows), dtype=torch.bool, device=rows.device)], 1)
        dtype = prefix.network.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        output = prefix.network(
            input_ids=tokens.reshape(1, -1),
            attention_mask=mask[None, None],
            position_ids=self.positions[:, None].expand(-1, count).reshape(1, -1),
            cache=prefix.cache,
            use_cache=True,
        )
        return output.logits[0].log_softmax(-1).unflatten(0, (groups, count))


class CopiedPrefix:
    """A text whose branches are rows of a batch with a copy of its cache each, for caches of any kind."""

    def __init__(self, model: CausalModel, tokens: Tensor) -> None:
        self.network, self.tokens = model.network, tokens
        self.log_probs = self.network(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)

    def group_size(self, branches: int) -> int:
        return 1

    def branch(self, positions: Tensor) -> CopiedBranches:
        cache = DynamicCache(config=self.network.config)
        self.network(input_ids=self.tokens[None, : int(positions) + 1], cache=cache, use_cache=True)
        return CopiedBranches(self, cache)


class CopiedBranches:
    """Branches of a CopiedPrefix after one position."""

    def __init__(self, prefix: CopiedPrefix, cache: DynamicCache) -> None:
        self.prefix, self.cache = prefix, cache

    def extend(self, parents: Tensor, tokens: Tensor, *, is_last: bool) -> Iterator[tuple[slice, Tensor]]:
        self.cache.reorder_cache(parents[0])  # type: ignore[arg-type]
        output = self.prefix.network(input_ids=tokens[0, :, None], cache=self.cache, use_cache=True)
        yield slice(0, tokens.shape[1]), output.logits[:, -1].log_softmax(-1)[None]
