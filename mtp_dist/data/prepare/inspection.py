"""`mtp-dist inspect` of a prepared corpus: what is in it, and what the heads are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtp_dist.data.corpus import SCAN_BLOCK_TOKENS, Corpus, check_ids, check_tokenizer, unigram_entropy
from mtp_dist.data.text_loss import TextLoss
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import ConfigError


@dataclass(frozen=True)
class DocumentLengths:
    """Tokens of a document, end-of-document token included."""

    shortest: int
    shortest_document: int
    """Its number, from 0."""
    median: float
    mean: float
    longest: int
    longest_document: int


@dataclass(frozen=True)
class TokenCount:
    id: int
    text: str
    count: int


@dataclass(frozen=True)
class Sample:
    """The first positions of a sample, as text."""

    tokens: list[str]
    targets: list[list[str]]
    """By head, of the same positions."""


@dataclass(frozen=True)
class CorpusReport:
    prefix: str
    tokenizer: str
    tokens: int
    documents: int
    bytes: int | None
    """Of the text; None where the corpus does not tell."""
    checked_bytes: int
    """Text that was decoded again when it was prepared."""
    lost_bytes: int
    """Text that this did not bring back."""
    lost_whitespace: int
    """Bytes of whitespace in it."""
    lengths: DocumentLengths
    distinct_tokens: int
    """Ids of the vocabulary that occur."""
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
    """Reads all tokens; `watch` is told how many after each block. Raises ConfigError where they are another's."""
    check_tokenizer(corpus, tokenizer)
    check_ids(corpus, tokenizer.vocab_size)
    if not len(corpus.tokens):
        raise ConfigError(f"{corpus.key} = '{corpus.prefix}' has no tokens: prepare it anew")
    counts = _count(corpus.tokens, tokenizer.vocab_size, on_progress)
    order = np.argsort(-counts, kind="stable")[:num_frequent]
    return CorpusReport(
        prefix=str(corpus.prefix),
        tokenizer=tokenizer.name,
        tokens=len(corpus.tokens),
        documents=corpus.documents,
        bytes=corpus.num_bytes,
        checked_bytes=corpus.loss.checked_bytes,
        lost_bytes=corpus.loss.lost_bytes,
        lost_whitespace=corpus.loss.lost_whitespace,
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
        counts += np.bincount(block, minlength=vocab_size)
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
    """None where the corpus ends before it."""
    length = len(tokens) - heads
    if length <= 0:
        return None
    texts = [token_text(tokenizer, int(token)) for token in tokens]
    return Sample(texts[:length], [texts[distance : distance + length] for distance in range(1, heads + 1)])


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as one can read it in a table."""
    if token == tokenizer.end_of_document:
        return "<end of document>"
    text = tokenizer.decode([token])
    return text if text.isprintable() and text.strip() == text and text else repr(text)


def _describe_loss(report: CorpusReport) -> str:
    if report.lost_bytes:
        loss = TextLoss(report.checked_bytes, report.lost_bytes, report.lost_whitespace)
        return loss.describe(report.tokenizer)
    return f"all of the {report.checked_bytes:,} bytes checked survive" if report.checked_bytes else "not measured"


def print_report(report: CorpusReport, console: Console) -> None:
    """For people."""
    lengths = report.lengths
    text = f", {report.bytes:,} bytes of text, {report.bytes / report.tokens:.2f} a token" if report.bytes else ""
    facts = {
        "Tokens": f"{report.tokens:,}{text}",
        "Documents": f"{report.documents:,}",
        "Shortest": f"{lengths.shortest:,} tokens, document {lengths.shortest_document:,}",
        "Median and mean": f"{lengths.median:,.0f} and {lengths.mean:,.0f} tokens",
        "Longest": f"{lengths.longest:,} tokens, document {lengths.longest_document:,}",
        "Tokenizer": f"{report.tokenizer}, {report.vocab_size:,} tokens, {report.distinct_tokens:,} of them occur",
        "Round trip": _describe_loss(report),
        "Unigram entropy": f"{report.unigram_entropy:.4f} nats a token",
    }
    for label, value in facts.items():
        console.print(Text(f"{label + ':':<17}{value}"), soft_wrap=True)
    if report.frequent:
        table = Table("id", "token", "count", "share", "", title="Most frequent tokens")
        for row in report.frequent:
            bar = "#" * round(40 * row.count / report.frequent[0].count)
            table.add_row(f"{row.id}", Text(row.text), f"{row.count:,}", f"{row.count / report.tokens:.2%}", bar)
        console.print(table)
    for number, sample in enumerate(report.samples):
        heads = [f"head {k} predicts" for k in range(1, len(sample.targets) + 1)]
        table = Table("position", "token", *heads, title=f"Sample {number}")
        for position, cells in enumerate(zip(sample.tokens, *sample.targets, strict=True)):
            table.add_row(str(position), *map(Text, cells))
        console.print(table)
