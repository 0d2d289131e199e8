"""Keys and values of every layer, in the slots of their positions."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mtp_dist.inference.spans import Span

INITIAL_SLOTS = 64


class PositionLayer(CacheLayerMixin):
    """Keys and values `[B, heads, slots, head_dim]` of one layer, written at the slots of the cache's current span."""

    is_croppable = True
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: "PositionCache") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._allocate(states, 0) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the span. Return those of all slots that its tokens attend to."""
        span = self.cache.span
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.shape[2] < span.end:
            self.keys, self.values = self._grow(self.keys), self._grow(self.values)
        if span.first_slot is not None:
            written = slice(span.first_slot, span.first_slot + key_states.shape[2])
            self.keys[:, :, written], self.values[:, :, written] = key_states, value_states
        else:
            slots = span.slots.to(key_states.device)
            rows = torch.arange(len(slots), device=slots.device)[:, None]
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, : span.end], self.values[:, :, : span.end]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the keys and values of slots `sources` to slots `targets`, `[B, m]` each."""
        sources, targets = sources.to(self.keys.device), targets.to(self.keys.device)
        rows = torch.arange(len(sources), device=self.keys.device)[:, None]
        self.keys[rows, :, targets] = self.keys[rows, :, sources]
        self.values[rows, :, targets] = self.values[rows, :, sources]

    def get_seq_length(self) -> int:
        return self.cache.span.end if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.cache.max_length or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.span.end, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: slots after the text are neither read nor kept."""

    def _allocate(self, states: Tensor, used: int) -> Tensor:
        """Return zeros: attention multiplies the values of masked slots by 0, so they must be finite."""
        needed = self.cache.span.end
        size = self.cache.max_length or max(needed, 2 * used, INITIAL_SLOTS)
        return states.new_zeros(*states.shape[:2], size, states.shape[3])

    def _grow(self, states: Tensor) -> Tensor:
        used = states.shape[2]
        grown = self._allocate(states, used)
        grown[:, :, :used] = states
        return grown


class PositionCache(Cache):
    """The cache of trunk and heads. Each row has its own length, which the spans of the forward passes define."""

    span: Span
    """The tokens of the current forward pass."""
    layers: list[PositionLayer]  # type: ignore[assignment]

    def __init__(self, num_layers: int, max_length: int | None = None) -> None:
        """Allocate `max_length` slots at the first use; by default more when they are needed."""
        super().__init__(layers=[PositionLayer(self) for _ in range(num_layers)])
        self.max_length = max_length

    def move(self, sources: Tensor, targets: Tensor, num_layers: int) -> None:
        """Copy the keys and values of slots `sources` to slots `targets`, `[B, m]` each, in the first layers."""
        for layer in self.layers[:num_layers]:
            layer.move(sources, targets)

    def keep(self, indices: Tensor) -> None:
        """Remove all but these rows of the batch."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (states[indices.to(states.device)] for states in (layer.keys, layer.values))

    def nbytes(self) -> int:
        """Return the allocated bytes."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)
