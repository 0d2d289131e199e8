"""Progress, results and tables of `mtp-dist prepare` and `mtp-dist inspect` for a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mtp_dist.cli.tables import fact_lines
from mtp_dist.data.prepare.inspection import CorpusReport
from mtp_dist.data.prepare.prepare import Prepared
from mtp_dist.data.prepare.tokenize import UnitSummary
from mtp_dist.data.text_loss import TextLoss

LINE_INTERVAL_S = 10
"""Seconds between lines if the output is not a terminal."""


class PreparationProgress:
    """Progress of a preparation: a bar in a terminal, otherwise a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(BarColumn(None), TextColumn("{task.description}"), console=console, expand=True)
        self._tokens = self._bytes = self._done = self._new = 0

    def start(self, total: int | None) -> None:
        self._total = total
        self._started = self._last_line = monotonic()
        if self._console.is_interactive:
            self._task = self._bar.add_task("starting the workers", total=total)
            self._bar.start()

    def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
        self._done += size
        if not reused:
            self._new += size
            self._tokens += summary.tokens
            self._bytes += summary.bytes
        if self._console.is_interactive:
            self._bar.update(self._task, completed=self._done, description=self._describe())
        elif monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = monotonic()
            # Text and soft_wrap: one line stays one line in a log file.
            self._console.print(Text(self._describe()), soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_interactive:
            self._bar.stop()

    def _describe(self) -> str:
        seconds = max(monotonic() - self._started, 1e-9)
        parts = [
            f"{self._tokens:,} tokens",
            f"{self._tokens / seconds:,.0f} tokens/s",
            f"{self._bytes / 1e6 / seconds:,.1f} MB/s",
        ]
        if self._total and self._new:
            left = timedelta(seconds=round(seconds * (self._total - self._done) / self._new))
            parts = [f"{100 * self._done / self._total:.0f} %", *parts, f"{left} left"]
        return " | ".join(parts)


def describe(prefix: Path, prepared: Prepared) -> str:
    """Return lines about a prepared corpus."""
    corpus = prepared.description
    lines = [
        f"{prefix}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, {corpus.bytes / 1e6:,.1f} MB of text, "
        f"{corpus.bytes / corpus.tokens:.2f} bytes per token"
    ]
    if corpus.prompt_tokens:
        lines.append(f"{corpus.prompt_tokens:,} tokens are those of prompts: no head learns to predict them")
    lines += prepared.files.describe()
    if prepared.text_loss.lost_bytes:
        lines.append(prepared.text_loss.describe(corpus.tokenizer.name))
    for number, text, first in (
        (corpus.empty_documents, "left out because they have no tokens", prepared.first_empty),
        (corpus.replaced_documents, "had invalid UTF-8 replaced", prepared.first_invalid),
        (corpus.skipped_documents, "left out for invalid UTF-8", prepared.first_invalid),
    ):
        if number:
            lines.append(f"{number:,} documents {text}" + (f", the first: {first}" if first else ""))
    return "\n".join(lines)


def _describe_loss(report: CorpusReport) -> str:
    if report.lost_bytes:
        loss = TextLoss(report.checked_bytes, report.lost_bytes, report.lost_whitespace)
        return loss.describe(report.tokenizer)
    return f"all of the {report.checked_bytes:,} bytes checked survive" if report.checked_bytes else "not measured"


def corpus_tables(report: CorpusReport) -> Iterator[RenderableType]:
    """Yield the lines and tables of a report for a terminal."""
    lengths = report.lengths
    text = f", {report.bytes:,} bytes of text, {report.bytes / report.tokens:.2f} per token" if report.bytes else ""
    text += f"; {report.prompt_tokens:,} of them in prompts" if report.prompt_tokens else ""
    yield from fact_lines(
        {
            "Tokens": f"{report.tokens:,}{text}",
            "Documents": f"{report.documents:,}",
            "Shortest": f"{lengths.shortest:,} tokens, document {lengths.shortest_document:,}",
            "Median and mean": f"{lengths.median:,.0f} and {lengths.mean:,.0f} tokens",
            "Longest": f"{lengths.longest:,} tokens, document {lengths.longest_document:,}",
            "Tokenizer": f"{report.tokenizer}, {report.vocab_size:,} tokens, {report.distinct_tokens:,} of them occur",
            "Round trip": _describe_loss(report),
            "Unigram entropy": f"{report.unigram_entropy:.4f} nats per token",
        }
    )
    if report.frequent:
        table = Table("id", "token", "count", "share", "", title="Most frequent tokens")
        for row in report.frequent:
            bar = "#" * round(40 * row.count / report.frequent[0].count)
            table.add_row(f"{row.id}", Text(row.text), f"{row.count:,}", f"{row.count / report.tokens:.2%}", bar)
        yield table
    for number, sample in enumerate(report.samples):
        heads = [f"head {k} predicts" for k in range(1, len(sample.targets) + 1)]
        table = Table("position", "token", *heads, title=f"Sample {number}")
        for position, cells in enumerate(zip(sample.tokens, *sample.targets, strict=True)):
            table.add_row(str(position), *map(Text, cells))
        yield table
