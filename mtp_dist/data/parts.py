"""Parts of a corpus: each has one work unit's tokens, written by one process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mtp_dist.config import ConfigError
from mtp_dist.data.documents import InvalidUtf8, WorkUnit
from mtp_dist.data.indexed import beside
from mtp_dist.data.tokenizer import Tokenizer

Item = TypeVar("Item")

HASH_BLOCK_BYTES = 1 << 22
BATCH_BYTES = 1 << 20
"""Text that a tokenizer gets at once: what it returns takes some hundred bytes of memory a token."""


PART_SUFFIXES = (".bin", ".lengths")


def _finished_part(prefix: Path) -> PartSummary | None:
    """None where anything of it is missing or damaged.

    Nothing of a part is synced to the disk: a machine that lost its power may have lost some of it.
    """
    try:
        summary = PartSummary(**json.loads(beside(prefix, ".json").read_text()))
        whole = sha256_of(*(beside(prefix, suffix) for suffix in PART_SUFFIXES)) == summary.sha256
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return summary if whole else None


def sha256_of(*files: Path) -> str:
    """Of the files' contents one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


@dataclass
class PartSummary:
    """What a part holds, and what was left out of it."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    first_empty: int | None = None
    """The document's number in the work unit."""
    replaced: int = 0
    skipped: int = 0
    first_invalid: int | None = None
    sha256: str = ""
    """Of the tokens and of the documents' lengths."""
    reused: bool = False
    """Finished by an earlier start of the same command."""


@contextmanager
def speaking_of(path: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system says into a sentence about the file, `path` where it names none."""
    try:
        yield
    except OSError as error:
        named = error.filename or path
        raise ConfigError(
            f"cannot {doing} {named} ({error.strerror or error}): once it can, the same command goes on from the "
            "finished parts"
        ) from None


def sync(path: Path) -> None:
    """Have the file, or the folder's list of names, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = beside(file, f".{os.getpid()}")
    temporary.write_text(text)
    sync(temporary)
    temporary.rename(file)


def in_batches(items: Iterable[Item], bytes_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in their order, in lists of about BATCH_BYTES."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += bytes_of(item)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class PartWriter:
    """Makes a numbered work unit a part: part-000012.bin with the tokens, .lengths with the number of each document
    (int32) and, last of all, .json with the summary."""

    folder: Path
    tokenizer: Tokenizer
    invalid_utf8: InvalidUtf8

    def prefix(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}"

    def __call__(self, task: tuple[int, WorkUnit]) -> PartSummary:
        """A part that is finished already and whole is left as it is. Raises ConfigError."""
        number, unit = task
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes take all cores
        prefix = self.prefix(number)
        summary_file = beside(prefix, ".json")
        with speaking_of(self.folder, "write in"):
            if (finished := _finished_part(prefix)) is not None:
                return replace(finished, reused=True)
            summary_file.unlink(missing_ok=True)
        temporary = beside(prefix, f".{os.getpid()}")
        try:
            summary = self._write(unit, temporary)
            with speaking_of(prefix, "write"):
                for suffix in PART_SUFFIXES:
                    beside(temporary, suffix).rename(beside(prefix, suffix))
                write_whole(summary_file, json.dumps(asdict(summary)))
        except BaseException:
            for suffix in PART_SUFFIXES:
                beside(prefix, suffix).unlink(missing_ok=True)
                beside(temporary, suffix).unlink(missing_ok=True)
            raise
        return summary

    def _write(self, unit: WorkUnit, prefix: Path) -> PartSummary:
        with speaking_of(prefix, "write"):
            stream = beside(prefix, ".bin").open("wb")
        summary, digest, all_lengths = PartSummary(), hashlib.sha256(), []
        with speaking_of(prefix, "write"), stream:
            for batch in self._batches(unit, summary):
                tokens, lengths = self.tokenizer.encode_documents([document for _, document in batch])
                kept = [length for length in lengths if length]
                all_lengths += kept
                summary.documents += len(kept)
                summary.tokens += len(tokens)
                texts = zip(batch, lengths, strict=True)
                summary.bytes += sum(len(document) for (_, document), length in texts if length)
                if len(kept) < len(lengths):
                    summary.empty += len(lengths) - len(kept)
                    if summary.first_empty is None:
                        summary.first_empty = batch[lengths.index(0)][0]
                digest.update(tokens.data)
                stream.write(tokens.data)
        packed_lengths = np.array(all_lengths, dtype=np.int32)
        digest.update(packed_lengths.data)
        with speaking_of(prefix, "write"):
            packed_lengths.tofile(beside(prefix, ".lengths"))
        summary.sha256 = digest.hexdigest()
        return summary

    def _batches(self, unit: WorkUnit, summary: PartSummary) -> Iterator[list[tuple[int, bytes]]]:
        """The documents that the tokenizer can read, with their numbers, about BATCH_BYTES at once."""
        texts = (
            (number, document if self.tokenizer.takes_any_bytes else self._valid(unit, number, document, summary))
            for number, document in enumerate(_read(unit))
        )
        return in_batches(((number, text) for number, text in texts if text is not None), lambda item: len(item[1]))

    def _valid(self, unit: WorkUnit, number: int, document: bytes, summary: PartSummary) -> bytes | None:
        """The document as valid UTF-8, or None where it is to be skipped. Raises ConfigError."""
        try:
            document.decode()
            return document
        except UnicodeDecodeError as error:
            if self.invalid_utf8 == "error":
                raise ConfigError(
                    f"{unit.place(number)}: invalid UTF-8 at byte {error.start} of the document, which "
                    f"{self.tokenizer.name!r} cannot read: mend it, or choose --invalid-utf8 replace or skip"
                ) from None
        if summary.first_invalid is None:
            summary.first_invalid = number
        if self.invalid_utf8 == "skip":
            summary.skipped += 1
            return None
        summary.replaced += 1
        return document.decode(errors="replace").encode()


def _read(unit: WorkUnit) -> Iterator[bytes]:
    with speaking_of(Path(unit.source), "read"):
        yield from unit.documents()
