"""The terminal's view of a preparation: a live bar, or a line now and then where the output is a file."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from mtp_dist.data.prepare.prepare import Prepared
from mtp_dist.data.prepare.tokenize import UnitSummary

SECONDS_BETWEEN_LINES = 10


class PreparationProgress:
    """Share of the input done, tokens and megabytes a second, time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(BarColumn(None), TextColumn("{task.description}"), console=console, expand=True)
        self._tokens = self._bytes = self._done = self._new = 0

    def start(self, total: int | None) -> None:
        self._total = total
        self._began = self._last_line = monotonic()
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
        elif monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = monotonic()
            # Text and soft_wrap: one line stays one line in a log file.
            self._console.print(Text(self._describe()), soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_interactive:
            self._bar.stop()

    def _describe(self) -> str:
        seconds = max(monotonic() - self._began, 1e-9)
        said = [
            f"{self._tokens:,} tokens",
            f"{self._tokens / seconds:,.0f} tokens/s",
            f"{self._bytes / 1e6 / seconds:,.1f} MB/s",
        ]
        if self._total and self._new:
            left = timedelta(seconds=round(seconds * (self._total - self._done) / self._new))
            said = [f"{100 * self._done / self._total:.0f} %", *said, f"{left} left"]
        return " | ".join(said)


def describe(prefix: Path, prepared: Prepared) -> str:
    """The result in one sentence a line."""
    corpus = prepared.description
    lines = [
        f"{prefix}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, {corpus.bytes / 1e6:,.1f} MB of text, "
        f"{corpus.bytes / corpus.tokens:.2f} bytes a token"
    ]
    lines += prepared.files.describe()
    if prepared.loss.lost_bytes:
        lines.append(prepared.loss.describe(corpus.tokenizer.name))
    for number, what, first in (
        (corpus.empty_documents, "left out because they have no tokens", prepared.first_empty),
        (corpus.replaced_documents, "had invalid UTF-8 replaced", prepared.first_invalid),
        (corpus.skipped_documents, "left out for invalid UTF-8", prepared.first_invalid),
    ):
        if number:
            lines.append(f"{number:,} documents {what}" + (f", the first: {first}" if first else ""))
    return "\n".join(lines)
