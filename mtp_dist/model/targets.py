"""Which tokens each head must predict, and where documents stop them and the attention."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""A target that does not count."""


class MicroBatch(NamedTuple):
    """Input of one forward pass, int64."""

    samples: Tensor
    """`[B, S + lookahead]`."""
    targets: Tensor
    """`[n, B, S]`, IGNORE_INDEX where a target does not count."""
    documents: Tensor | None
    """Index of each token's document within its sample, `[B, S + lookahead]`; None if documents do not matter."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to a device; from pinned memory without waiting for it."""
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        return MicroBatch(
            self.samples.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), documents
        )

    def pin_memory(self) -> "MicroBatch":
        documents = None if self.documents is None else self.documents.pin_memory()
        return MicroBatch(self.samples.pin_memory(), self.targets.pin_memory(), documents)


class TrainBatch(NamedTuple):
    """One data-parallel rank's part of a global batch or of a validation set."""

    micro_batches: Sequence[MicroBatch]
    """In the order of the forward passes; empty on a stage that needs no data."""
    num_micro_batches: int
    """Micro-batches per data-parallel rank, the same on every stage."""
    valid_targets: Tensor
    """Number of targets of each head that count, `[n]`, fp64."""


def count_valid_targets(micro_batches: Sequence[MicroBatch], heads: int) -> Tensor:
    """Return the number of targets of each head that count, `[n]`, fp64."""
    counts = torch.zeros(heads, dtype=torch.float64)
    return sum(((part.targets != IGNORE_INDEX).sum((1, 2)) for part in micro_batches), counts)


def document_ids(tokens: Tensor, end_of_document: int) -> Tensor:
    """Which document, counted from 0, each of the tokens `[B, S]` lies in. An end-of-document token is its last one."""
    ends = (tokens == end_of_document).long()
    return ends.cumsum(-1) - ends


def document_attention_bias(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """What keeps attention within documents `[B, S]`: `[B, 1, S, S]`, 0 where a position sees another, else -inf.

    It sees itself and those before it in its document. Rotary embeddings know only how far two positions lie apart, so
    none starts anew with a document. Numbers to add and not truth values, as PyTorch would turn those into such numbers
    in every layer, and keep them for its backward pass.
    """
    seen = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))


def head_targets(samples: Tensor, distances: Sequence[int], length: int, documents: Tensor | None = None) -> Tensor:
    """Targets `[n, B, S]` of samples `[B, S + lookahead]`: those of a head at distance d are `samples[:, d : d + S]`.

    S is `length`. Position t of head k asks for token t + d_k, with d_k = k in Gloeckle et al. 2024, equation 2, so
    every head has a real label at every position. Where `documents [B, S + lookahead]` are given, it counts only if
    token t lies in the same one.
    """
    targets = torch.stack([samples[:, distance : distance + length] for distance in distances])
    if documents is None:
        return targets
    of_targets = torch.stack([documents[:, distance : distance + length] for distance in distances])
    return targets.masked_fill(of_targets != documents[:, :length], IGNORE_INDEX)
