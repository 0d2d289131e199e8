"""Tokenize the documents of a work unit in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.sources.documents import with_valid_utf8
from mtp_dist.data.sources.work_units import InvalidUtf8, WorkUnit, in_batches
from mtp_dist.data.text_loss import CHECKED_BYTES, measure_text_loss
from mtp_dist.data.tokenizer import Ids, Tokenizer, encode_documents
from mtp_dist.errors import DataError
from mtp_dist.fs import explain_os_errors

BATCH_BYTES = 1 << 20
"""Text per call of a tokenizer, whose result takes some hundred bytes of memory per token."""


@dataclass
class UnitSummary:
    """Counts of a work unit: what it became, and what was left out."""

    documents: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    """Tokens of prompts, which are targets of no head."""
    bytes: int = 0
    empty: int = 0
    empty_bytes: int = 0
    """Bytes of text of the documents without tokens."""
    first_empty: int | None = None
    """Number of the first document without tokens in the work unit."""
    replaced: int = 0
    skipped: int = 0
    first_invalid: int | None = None
    checked_bytes: int = 0
    """Bytes of text that were decoded again."""
    lost_bytes: int = 0
    """Checked bytes that decoding did not bring back."""
    lost_whitespace: int = 0
    """Lost bytes that are whitespace."""
    first_lost: str = ""
    """Most frequent lost characters of the first batch that lost any."""


@dataclass
class EncodedUnit:
    """The tokens of a work unit."""

    summary: UnitSummary = field(default_factory=UnitSummary)
    tokens: list[Ids] = field(default_factory=list)
    """Consecutive parts."""
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Tokens per document, end included."""


@dataclass(frozen=True)
class UnitEncoder:
    """The function that tokenizes work units; each worker process gets a copy."""

    tokenizer: Tokenizer
    invalid_utf8: InvalidUtf8
    dtype: type[np.generic]
    """Type of the stored ids."""

    def __call__(self, unit: WorkUnit) -> EncodedUnit:
        """Tokenize a unit. Raise DataError if it cannot be read or a document is not text."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes use all cores
        encoded, all_lengths = EncodedUnit(), []
        summary = encoded.summary
        for batch in self._batches(unit, summary):
            numbers, texts = zip(*batch, strict=True)
            tokens, lengths = encode_documents(self.tokenizer, texts, partial(_location, unit, numbers))
            encoded.tokens.append(tokens.astype(self.dtype, copy=False))
            kept = [length for length in lengths if length]
            all_lengths += kept
            summary.documents += len(kept)
            summary.tokens += len(tokens)
            summary.prompt_tokens += int((tokens < 0).sum())
            num_bytes = sum(len(text) for text, length in zip(texts, lengths, strict=True) if length)
            summary.bytes += num_bytes
            summary.empty_bytes += sum(map(len, texts)) - num_bytes
            if summary.checked_bytes < CHECKED_BYTES:
                loss = measure_text_loss(self.tokenizer, texts, tokens, lengths)
                summary.checked_bytes += loss.checked_bytes
                summary.lost_bytes += loss.lost_bytes
                summary.lost_whitespace += loss.lost_whitespace
                summary.first_lost = summary.first_lost or loss.most_lost()
            if len(kept) < len(lengths):
                summary.empty += len(lengths) - len(kept)
                if summary.first_empty is None:
                    summary.first_empty = numbers[lengths.index(0)]
        encoded.lengths = np.array(all_lengths, dtype=np.int32)
        return encoded

    def _batches(self, unit: WorkUnit, summary: UnitSummary) -> Iterator[list[tuple[int, bytes]]]:
        """Yield the documents that the tokenizer can read, with their numbers, in batches."""
        texts = (
            (number, document if self.tokenizer.accepts_raw_bytes else self._valid(unit, number, document, summary))
            for number, document in enumerate(_read(unit))
        )
        readable = ((number, text) for number, text in texts if text is not None)
        return in_batches(readable, lambda item: len(item[1]), BATCH_BYTES)

    def _valid(self, unit: WorkUnit, number: int, document: bytes, summary: UnitSummary) -> bytes | None:
        """Return the document as valid UTF-8, or None to skip it. Raise DataError."""
        try:
            document.decode()
            return document
        except UnicodeDecodeError as error:
            if self.invalid_utf8 == "error":
                raise DataError(
                    f"{unit.location(number)}: invalid UTF-8 at byte {error.start} of the document, which "
                    f"{self.tokenizer.name!r} cannot read: fix it, or choose --invalid-utf8 replace or skip"
                ) from None
        if summary.first_invalid is None:
            summary.first_invalid = number
        if self.invalid_utf8 == "skip":
            summary.skipped += 1
            return None
        summary.replaced += 1
        return with_valid_utf8(document)


def _location(unit: WorkUnit, numbers: Sequence[int], index: int) -> str:
    return unit.location(numbers[index])


def _read(unit: WorkUnit) -> Iterator[bytes]:
    with explain_os_errors(Path(unit.source), "read"):
        yield from unit.documents()
