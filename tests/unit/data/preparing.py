"""What the tests of `prepare` share; processes import it by its name."""

import hashlib
import math
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from mtp_dist.data.corpus import Corpus, open_corpus
from mtp_dist.data.prepare.corpus_writer import JOURNAL
from mtp_dist.data.prepare.prepare import Prepared, Request, prepare
from mtp_dist.data.prepare.tokenize import UnitSummary
from mtp_dist.data.prepare.worker_pool import preload_modules
from mtp_dist.data.sources.text_sources import InputOptions

SMALL_UNIT = 2000


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.total: int | None = -1
        self.reused: list[bool] = []
        """Of each work unit."""

    def start(self, total: int | None) -> None:
        self.total = total

    def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
        self.reused.append(reused)


def request(
    inputs: Path | str | Sequence[Path | str],
    prefix: Path,
    tokenizer: Path | str = "bytes",
    workers: int = 1,
    unit_bytes: int = SMALL_UNIT,
    invalid_utf8: str = "error",
    **options: object,
) -> Request:
    names = [inputs] if isinstance(inputs, Path | str) else inputs
    chosen = InputOptions(**options)  # type: ignore[arg-type]
    return Request(tuple(map(str, names)), prefix, str(tokenizer), chosen, invalid_utf8, workers, unit_bytes)  # type: ignore[arg-type]


def made(asked: Request) -> Prepared:
    return prepare(asked, Recorder())


class Halting(Recorder):
    """A progress that waits `pause` seconds after each work unit, and after the first `units` of them forever."""

    def __init__(self, units: float, pause: float) -> None:
        super().__init__()
        self.units = units
        self.pause = pause

    def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
        super().advance(size, summary, reused)
        time.sleep(self.pause)
        while len(self.reused) >= self.units:
            time.sleep(1)


def start(asked: Request, units: float = math.inf, pause: float = 0.0) -> BaseProcess:
    """`prepare` in a process of its own, to be killed; it may have workers. units and pause: see Halting."""
    preload_modules("mtp_dist.data.prepare.tokenize")
    target, arguments = prepare, (asked, Halting(units, pause))
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    return process


def units_in(asked: Request) -> int:
    """How many work units have been added to the unfinished corpus."""
    journal = asked.folder / JOURNAL
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def documents_of(prefix: Path) -> list[list[int]]:
    """The tokens of each document, without its end."""
    corpus: Corpus = open_corpus(prefix, "test")
    documents, start = [], 0
    for length in corpus.document_lengths:
        documents.append(corpus.tokens[start : start + length - 1].tolist())
        start += length
    return documents


def texts_of(prefix: Path) -> list[bytes]:
    """The documents of a corpus of bytes."""
    return [bytes(document) for document in documents_of(prefix)]


def digests(prefix: Path) -> dict[str, str]:
    """SHA-256 of everything that begins with the prefix."""
    files = [file for file in sorted(prefix.parent.glob(prefix.name + ".*")) if file.is_file()]
    return {file.name[len(prefix.name) :]: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
