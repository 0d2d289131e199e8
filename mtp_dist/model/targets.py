"""Micro-batches and their targets, and the documents that bound targets and attention."""

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target that does not count."""


class MicroBatch(NamedTuple):
    """Input of one forward pass, int64."""

    samples: Tensor
    """`[B, S + lookahead]`."""
    targets: Tensor
    """`[n, B, S]`, IGNORE_INDEX for a target that does not count."""
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
    """Micro-batches in the order of the forward passes; empty on a stage that needs no data."""
    num_micro_batches: int
    """Micro-batches per data-parallel rank, the same on every stage."""
    valid_targets: Tensor
    """Number of targets of each head that count, `[n]`, fp64."""


def split_into_micro_batches(
    samples: Tensor, targets: Tensor, documents: Tensor | None, micro_batch_size: int
) -> list[MicroBatch]:
    """Split samples `[B, S + lookahead]`, targets `[n, B, S]` and documents, B a multiple of the micro-batch size."""
    count = len(samples) // micro_batch_size
    document_parts = repeat(None, count) if documents is None else documents.split(micro_batch_size)
    parts = zip(samples.split(micro_batch_size), targets.split(micro_batch_size, 1), document_parts, strict=True)
    return [MicroBatch(*part) for part in parts]


def count_valid_targets(micro_batches: Sequence[MicroBatch], heads: int) -> Tensor:
    """Return the number of targets of each head that count, `[n]`, fp64."""
    counts = torch.zeros(heads, dtype=torch.float64)
    return sum(((part.targets != IGNORE_INDEX).sum((1, 2)) for part in micro_batches), counts)


def document_ids(tokens: Tensor, end_of_document: int) -> Tensor:
    """Return the index of each token's document, from 0, for tokens `[B, S]`. An end-of-document token ends its own."""
    ends = (tokens == end_of_document).long()
    return ends.cumsum(-1) - ends


def attention_bias(documents: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return the additive causal attention mask `[B, 1, S, S]`: 0 within a document, -inf across documents.

    documents: `[B, S]`, index of each token's document. window: positions that each position attends to, itself and
    those before it; by default all. Positions do not restart with a document, because RoPE depends
    only on the distance of two positions. The mask is additive because PyTorch would convert a boolean one in every
    layer and keep the result for its backward pass.
    """
    visible = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)
    if window is not None:
        visible = visible.triu(1 - window)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


def without_prompt_marks(samples: Tensor) -> Tensor:
    """Return the ids of all tokens. A token of a prompt is marked: it is the bitwise complement of its id, below 0.

    It is read like any other token, but is a target of no head, see `head_targets`.
    """
    return torch.where(samples < 0, ~samples, samples)


def head_targets(samples: Tensor, distances: Sequence[int], length: int, documents: Tensor | None = None) -> Tensor:
    """Return the targets `[n, B, S]` of samples `[B, S + lookahead]`: `samples[:, d : d + S]` for distance d.

    length: S. Head k predicts token t + d_k at position t, with d_k = k in Gloeckle et al. 2024, equation 2, so every
    head has a real label at every position. A token of a prompt, which is negative, does not count for any head. If
    documents `[B, S + lookahead]` are given, a target counts only if it lies in position t's document.
    """
    targets = torch.stack([samples[:, distance : distance + length] for distance in distances])
    targets = targets.masked_fill(targets < 0, IGNORE_INDEX)
    if documents is None:
        return targets
    target_documents = torch.stack([documents[:, distance : distance + length] for distance in distances])
    return targets.masked_fill(target_documents != documents[:, :length], IGNORE_INDEX)
