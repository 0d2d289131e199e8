"""Parts of a corpus: each is one work unit's documents in Megatron-core's format, written by one process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mtp_dist.config import ConfigError
from mtp_dist.data.documents import InvalidUtf8, WorkUnit
from mtp_dist.data.indexed import beside
from mtp_dist.data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
"""Text that a tokenizer gets at once: what it returns takes some hundred bytes of memory a token."""


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


@dataclass(frozen=True)
class PartWriter:
    """Makes a numbered work unit a part: part-000012.bin, .idx and, last of all, .json with the summary."""

    folder: Path
    tokenizer: Tokenizer
    invalid_utf8: InvalidUtf8

    def prefix(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}"

    def __call__(self, task: tuple[int, WorkUnit]) -> PartSummary:
        """A part that is finished already is left as it is. Raises ConfigError."""
        number, unit = task
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes take all cores
        prefix = self.prefix(number)
        summary_file = beside(prefix, ".json")
        with speaking_of(self.folder, "write in"):
            if summary_file.exists():
                return replace(PartSummary(**json.loads(summary_file.read_text())), reused=True)
        temporary = beside(prefix, f".{os.getpid()}")
        try:
            summary = self._write(unit, temporary)
            with speaking_of(prefix, "write"):
                for suffix in (".bin", ".idx"):
                    sync(beside(temporary, suffix))
                    beside(temporary, suffix).rename(beside(prefix, suffix))
                write_whole(summary_file, json.dumps(asdict(summary)))
                sync(self.folder)
        except BaseException:
            for suffix in (".bin", ".idx"):
                beside(temporary, suffix).unlink(missing_ok=True)
            raise
        return summary

    def _write(self, unit: WorkUnit, prefix: Path) -> PartSummary:
        from mtp_dist.data.building import new_builder

        with speaking_of(prefix, "write"):
            builder = new_builder(beside(prefix, ".bin"), self.tokenizer.vocab_size)
        summary = PartSummary()
        for batch in self._batches(unit, summary):
            tokens, lengths = self.tokenizer.encode_documents([document for _, document in batch])
            kept = [length for length in lengths if length]
            summary.documents += len(kept)
            summary.tokens += len(tokens)
            summary.bytes += sum(len(document) for (_, document), length in zip(batch, lengths, strict=True) if length)
            if len(kept) < len(lengths):
                summary.empty += len(lengths) - len(kept)
                if summary.first_empty is None:
                    summary.first_empty = batch[lengths.index(0)][0]
            with speaking_of(prefix, "write"):
                builder.add_document(tokens, kept)
        # add_document took each batch for one document.
        builder.document_indices = list(range(len(builder.sequence_lengths) + 1))
        with speaking_of(prefix, "write"):
            builder.finalize(str(beside(prefix, ".idx")))
        return summary

    def _batches(self, unit: WorkUnit, summary: PartSummary) -> Iterator[list[tuple[int, bytes]]]:
        """The documents that the tokenizer can read, with their numbers, about BATCH_BYTES at once."""
        batch: list[tuple[int, bytes]] = []
        size = 0
        for number, document in enumerate(_read(unit)):
            text = document if self.tokenizer.takes_any_bytes else self._valid(unit, number, document, summary)
            if text is not None:
                batch.append((number, text))
                size += len(text)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

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
    with speaking_of(Path(unit.place(0)), "read"):
        yield from unit.documents()
