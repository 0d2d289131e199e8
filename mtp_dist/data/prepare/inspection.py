"""The report of `mtp-dist inspect` on a prepared corpus: statistics, and samples with the heads' targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.corpus import SCAN_BLOCK_TOKENS, Corpus, check_ids, check_tokenizer, unigram_entropy
from mtp_dist.data.tokenizer import Tokenizer, without_marks
from mtp_dist.errors import DataError

PROMPT = "(prompt)"
"""Text of a target that does not count because it is a token of a prompt."""


@dataclass(frozen=True)
class DocumentLengths:
    """Statistics of the documents' lengths in tokens, end-of-document tokens included."""

    shortest: int
    shortest_document: int
    """Number of the shortest document, counted from 0."""
    median: float
    mean: float
    longest: int
    longest_document: int


@dataclass(frozen=True)
class TokenCount:
    """A token and how often it occurs."""

    id: int
    text: str
    count: int


@dataclass(frozen=True)
class Sample:
    """The first positions of a sample as text."""

    tokens: list[str]
    targets: list[list[str]]
    """Targets of these positions by head."""


@dataclass(frozen=True)
class CorpusReport:
    """Everything that is shown about a corpus."""

    prefix: str
    tokenizer: str
    tokens: int
    prompt_tokens: int
    """Tokens of prompts, which are targets of no head."""
    documents: int
    bytes: int | None
    """Bytes of text; None if unknown."""
    checked_bytes: int
    """Bytes of text that were decoded again when it was prepared."""
    lost_bytes: int
    """Checked bytes that decoding did not bring back."""
    lost_whitespace: int
    """Lost bytes that are whitespace."""
    lengths: DocumentLengths
    distinct_tokens: int
    """Number of ids that occur."""
    vocab_size: int
    unigram_entropy: float
    """Nats per token."""
    frequent: list[TokenCount]
    """The most frequent tokens."""
    samples: list[Sample]


def inspect_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    heads: int,
    positions: int,
    num_samples: int,
    num_frequent: int,
    on_progress: Callable[[int], None],
) -> CorpusReport:
    """Read all tokens and call `on_progress` with the number read. Raise DataError if they do not fit the tokenizer."""
    check_tokenizer(corpus, tokenizer)
    check_ids(corpus, tokenizer.vocab_size)
    if not len(corpus.tokens):
        raise DataError(f"{corpus.key} = '{corpus.prefix}' has no tokens: prepare it again")
    counts = _count(corpus.tokens, tokenizer.vocab_size, on_progress)
    order = np.argsort(-counts, kind="stable")[:num_frequent]
    return CorpusReport(
        prefix=str(corpus.prefix),
        tokenizer=tokenizer.name,
        tokens=len(corpus.tokens),
        prompt_tokens=corpus.description.prompt_tokens if corpus.description else 0,
        documents=corpus.documents,
        bytes=corpus.num_bytes,
        checked_bytes=corpus.text_loss.checked_bytes,
        lost_bytes=corpus.text_loss.lost_bytes,
        lost_whitespace=corpus.text_loss.lost_whitespace,
        lengths=_lengths(corpus.document_lengths),
        distinct_tokens=int((counts > 0).sum()),
        vocab_size=tokenizer.vocab_size,
        unigram_entropy=unigram_entropy(counts),
        frequent=[TokenCount(int(i), token_text(tokenizer, int(i)), int(counts[i])) for i in order if counts[i]],
        samples=[
            sample
            for start in range(0, num_samples * positions, positions)
            if (sample := _sample(corpus.tokens[start : start + positions + heads], heads, tokenizer))
        ],
    )


def _count(tokens: NDArray[Any], vocab_size: int, on_progress: Callable[[int], None]) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), SCAN_BLOCK_TOKENS):
        block = tokens[start : start + SCAN_BLOCK_TOKENS]
        counts += np.bincount(without_marks(block), minlength=vocab_size)
        on_progress(start + len(block))
    return counts


def _lengths(lengths: NDArray[Any]) -> DocumentLengths:
    shortest, longest = int(np.argmin(lengths)), int(np.argmax(lengths))
    return DocumentLengths(
        shortest=int(lengths[shortest]),
        shortest_document=shortest,
        median=float(np.median(lengths)),
        mean=float(np.mean(lengths)),
        longest=int(lengths[longest]),
        longest_document=longest,
    )


def _sample(tokens: NDArray[Any], heads: int, tokenizer: Tokenizer) -> Sample | None:
    """Return a sample, or None if there are too few tokens."""
    length = len(tokens) - heads
    if length <= 0:
        return None
    texts = [token_text(tokenizer, int(token)) for token in without_marks(tokens)]
    targets = [PROMPT if token < 0 else text for token, text in zip(tokens, texts, strict=True)]
    return Sample(texts[:length], [targets[distance : distance + length] for distance in range(1, heads + 1)])


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token in readable form."""
    if token == tokenizer.end_of_document:
        return "<end of document>"
    text = tokenizer.decode_with_special_tokens([token])
    return text if text.isprintable() and text.strip() == text and text else repr(text)
