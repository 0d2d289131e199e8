"""Work units: pieces of the input, each of which a process reads by itself.

A place is where a document comes from, for a person: a file, a line counted from 1, or a row counted from 0.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

from mtp_dist.errors import ConfigError

BLOCK_BYTES = 1 << 20

InvalidUtf8 = Literal["error", "replace", "skip"]
"""What to do about a document that is no text, where the tokenizer needs text."""


@dataclass(frozen=True, kw_only=True)
class WorkUnit(ABC):
    size: int
    """Its share of the input's total, in the unit of that."""

    @abstractmethod
    def documents(self) -> Iterator[bytes]:
        """The documents in their order, also the empty ones. Raises ConfigError or OSError."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Where document number `index` comes from; may have to read the file up to there."""

    @property
    @abstractmethod
    def source(self) -> str:
        """The file or dataset, the first one where there are several."""


@dataclass(frozen=True)
class WholeFiles(WorkUnit):
    """Files of text or code, each of them one document."""

    files: tuple[Path, ...]

    @property
    def source(self) -> str:
        return str(self.files[0])

    def documents(self) -> Iterator[bytes]:
        for file in self.files:
            yield file.read_bytes()

    def place(self, index: int) -> str:
        return str(self.files[index])


@dataclass(frozen=True)
class LineRange(WorkUnit):
    """The lines of a JSONL file that begin at the bytes start .. end - 1."""

    file: Path
    start: int
    end: int
    field: str

    @property
    def source(self) -> str:
        return str(self.file)

    def documents(self) -> Iterator[bytes]:
        with self.file.open("rb") as stream:
            position = self._skip_to_first_line(stream)
            for index, line in enumerate(stream):
                if position >= self.end:
                    return
                position += len(line)
                yield document_of_line(line, self.field, partial(self.place, index))
        if position < self.end:
            raise ConfigError(f"{self.file} ends at byte {position}, it had {self.end} or more before: it was cut off")

    def place(self, index: int) -> str:
        return f"{self.file}, line {self._lines_before() + index + 1}"

    def _skip_to_first_line(self, stream: BinaryIO) -> int:
        if self.start == 0:
            return 0
        stream.seek(self.start - 1)
        return self.start - 1 + len(stream.readline())

    def _lines_before(self) -> int:
        """Counted when a place is asked for, so that reading need not begin at the file's start."""
        with self.file.open("rb") as stream:
            left = self._skip_to_first_line(stream)
            stream.seek(0)
            lines = 0
            while left > 0 and (block := stream.read(min(left, BLOCK_BYTES))):
                lines += block.count(b"\n")
                left -= len(block)
            return lines


@dataclass(frozen=True)
class LineList(WorkUnit):
    """Lines of a compressed JSONL file, which has no other way to them than to read it from its start."""

    file: Path
    lines_before: int
    lines: tuple[bytes, ...]
    field: str

    @property
    def source(self) -> str:
        return str(self.file)

    def documents(self) -> Iterator[bytes]:
        for index, line in enumerate(self.lines):
            yield document_of_line(line, self.field, partial(self.place, index))

    def place(self, index: int) -> str:
        return f"{self.file}, line {self.lines_before + index + 1}"


@dataclass(frozen=True)
class RowGroups(WorkUnit):
    """Row groups of a Parquet file."""

    file: Path
    groups: tuple[int, ...]
    rows_before: int
    field: str

    @property
    def source(self) -> str:
        return str(self.file)

    def documents(self) -> Iterator[bytes]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.file) as parquet:
                for batch in parquet.iter_batches(1024, list(self.groups), [self.field], use_threads=False):
                    for document in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        yield document or b""
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(f"{self.file} is no whole Parquet file ({error}): give it anew") from None

    def place(self, index: int) -> str:
        return row_place(self.file, self.rows_before + index)


@dataclass(frozen=True)
class RowList(WorkUnit):
    """Rows of a Hugging Face dataset, which one process reads for all."""

    dataset: str
    rows_before: int
    texts: tuple[bytes, ...]

    @property
    def source(self) -> str:
        return self.dataset

    def documents(self) -> Iterator[bytes]:
        yield from self.texts

    def place(self, index: int) -> str:
        return row_place(self.dataset, self.rows_before + index)


def row_place(table: str | Path, row: int) -> str:
    return f"{table}, row {row}"


def document_of_line(line: bytes, field: str, place: Callable[[], str]) -> bytes:
    """The document of a JSONL line; empty where the line is blank or the field is null.

    `place` is called where there is a mistake to speak of. Raises ConfigError.
    """
    line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some programs begin a file with
    if not line.strip():
        return b""
    try:
        # Bytes that are no UTF-8 come out as they went in: the tokenizer is the one to judge them.
        record = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{place()} is not JSON that can be read ({reason}): fix or remove it") from None
    return document_of_record(record, field, place)


def document_of_record(record: object, field: str, place: Callable[[], str]) -> bytes:
    """Return the document of a record; empty if the field is null. Raise ConfigError if it is not text."""
    if not isinstance(record, dict):
        raise ConfigError(f"{place()} is not a JSON object with fields: fix or remove it")
    if field not in record:
        raise missing_field(place(), field, record)
    return bytes_of_text(record[field], field, place)


def bytes_of_text(text: object, field: str, place: Callable[[], str]) -> bytes:
    """The bytes of a field's value, none for null. Raises ConfigError where it is not text."""
    if text is None:
        return b""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"{place()}: the field {field!r} is not text but {type(text).__name__}: choose another field")
    for errors in ("strict", "surrogateescape", "surrogatepass"):
        try:
            return text.encode(errors=errors)
        except UnicodeEncodeError:
            continue
    raise AssertionError("surrogatepass encodes everything")


def missing_field(place: str, field: str, present: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"{place} has no field {field!r}, it has {', '.join(map(repr, present)) or 'none'}: choose another field"
    )
