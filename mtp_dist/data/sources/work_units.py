"""Work units: pieces of the input that a process can read on its own.

Error messages give the location of a document: a file, a line counted from 1, or a row counted from 0.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from mtp_dist.data.sources.fields import Fields
from mtp_dist.errors import DataError

Item = TypeVar("Item")

BLOCK_BYTES = 1 << 20

InvalidUtf8 = Literal["error", "replace", "skip"]
"""Treatment of a document that is not UTF-8 if the tokenizer requires it."""


@dataclass(frozen=True, kw_only=True)
class WorkUnit(ABC):
    size: int
    """Size in the units of the input's total."""

    @abstractmethod
    def documents(self) -> Iterator[bytes]:
        """Yield the documents in order, also empty ones. Raise DataError or OSError."""

    @abstractmethod
    def location(self, index: int) -> str:
        """Return the location of document number `index`. It may read the file up to there."""

    @property
    @abstractmethod
    def source(self) -> str:
        """The file or dataset, the first one if there are several."""


@dataclass(frozen=True)
class WholeFiles(WorkUnit):
    """Files of text or code, one document each."""

    files: tuple[Path, ...]

    @property
    def source(self) -> str:
        return str(self.files[0])

    def documents(self) -> Iterator[bytes]:
        for file in self.files:
            yield file.read_bytes()

    def location(self, index: int) -> str:
        return str(self.files[index])


@dataclass(frozen=True)
class _PartOfFile(WorkUnit):
    """Some records of a file."""

    file: Path

    @property
    def source(self) -> str:
        return str(self.file)


@dataclass(frozen=True)
class LineRange(_PartOfFile):
    """The lines of a JSONL file that start at the bytes start .. end - 1."""

    start: int
    end: int
    fields: Fields

    def documents(self) -> Iterator[bytes]:
        with self.file.open("rb") as stream:
            position = self._skip_to_first_line(stream)
            for index, line in enumerate(stream):
                if position >= self.end:
                    return
                position += len(line)
                yield parse_line(line, self.fields, partial(self.location, index))
        if position < self.end:
            raise DataError(
                f"{self.file} ends at byte {position}, it had {self.end} or more before: it was truncated, restore it"
            )

    def location(self, index: int) -> str:
        return f"{self.file}, line {self._lines_before() + index + 1}"

    def _skip_to_first_line(self, stream: BinaryIO) -> int:
        if self.start == 0:
            return 0
        stream.seek(self.start - 1)
        return self.start - 1 + len(stream.readline())

    def _lines_before(self) -> int:
        """Count the lines before this unit. Only error messages need it, so that reading can start anywhere."""
        with self.file.open("rb") as stream:
            left = self._skip_to_first_line(stream)
            stream.seek(0)
            lines = 0
            while left > 0 and (block := stream.read(min(left, BLOCK_BYTES))):
                lines += block.count(b"\n")
                left -= len(block)
            return lines


@dataclass(frozen=True)
class LineList(_PartOfFile):
    """Lines of a compressed JSONL file, which can only be read from its start."""

    lines_before: int
    lines: tuple[bytes, ...]
    fields: Fields

    def documents(self) -> Iterator[bytes]:
        for index, line in enumerate(self.lines):
            yield parse_line(line, self.fields, partial(self.location, index))

    def location(self, index: int) -> str:
        return f"{self.file}, line {self.lines_before + index + 1}"


@dataclass(frozen=True)
class RowGroups(_PartOfFile):
    """Row groups of a Parquet file."""

    groups: tuple[int, ...]
    rows_before: int
    fields: Fields

    def documents(self) -> Iterator[bytes]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.file) as parquet:
                names = self.fields.names
                row = self.rows_before
                for batch in parquet.iter_batches(1024, list(self.groups), list(names), use_threads=False):
                    columns = [batch.column(name) for name in names]
                    if not self.fields.chat_template:  # bytes that are not UTF-8 are kept
                        columns = [column.cast(pyarrow.large_binary()) for column in columns]
                    for values in zip(*(column.to_pylist() for column in columns), strict=True):
                        yield self.fields.document(values, partial(row_location, self.file, row))
                        row += 1
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{self.file} is not a valid Parquet file ({error}): copy it again") from None

    def location(self, index: int) -> str:
        return row_location(self.file, self.rows_before + index)


@dataclass(frozen=True)
class RowList(WorkUnit):
    """Rows of a table or a Hugging Face dataset, which one process reads for all."""

    dataset: str
    rows_before: int
    texts: tuple[bytes, ...]

    @property
    def source(self) -> str:
        return self.dataset

    def documents(self) -> Iterator[bytes]:
        yield from self.texts

    def location(self, index: int) -> str:
        return row_location(self.dataset, self.rows_before + index)


def in_batches(items: Iterable[Item], bytes_of: Callable[[Item], int], batch_bytes: int) -> Iterator[list[Item]]:
    """Yield the items in order, in lists of about `batch_bytes`."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += bytes_of(item)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def row_lists(table: str, rows: Iterable[tuple[bytes, int]], unit_bytes: int) -> Iterator[WorkUnit]:
    """Yield units from rows, each with the position in the table after it."""
    begin = rows_before = 0
    for batch in in_batches(rows, lambda row: len(row[0]), unit_bytes):
        end = batch[-1][1]
        yield RowList(table, rows_before, tuple(text for text, _ in batch), size=end - begin)
        begin, rows_before = end, rows_before + len(batch)


def row_location(table: str | Path, row: int) -> str:
    return f"{table}, row {row}"


def parse_line(line: bytes, fields: Fields, location: Callable[[], str]) -> bytes:
    """Return the document of a JSONL line, empty if the line is blank or the field is null.

    Raise DataError with the location if the line is not a record from whose fields a document can be made.
    """
    line = line.removeprefix(b"\xef\xbb\xbf")  # some programs start a file with this byte order mark
    if not line.strip():
        return b""
    try:
        # Bytes that are not UTF-8 are kept: not every tokenizer refuses them.
        record = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise DataError(f"{location()} is not valid JSON ({reason}): fix or remove it") from None
    return parse_record(record, fields, location)


def parse_record(record: object, fields: Fields, location: Callable[[], str]) -> bytes:
    """Return the document of a record; empty if the field is null. Raise DataError if none can be made from it."""
    if not isinstance(record, dict):
        raise DataError(f"{location()} is not a JSON object with fields: fix or remove it")
    if missing := fields.missing(record):
        raise missing_field_error(location(), fields, missing, record)
    return fields.document([record[name] for name in fields.names], location)


def missing_field_error(location: str, fields: Fields, missing: str, present: Iterable[str]) -> DataError:
    return DataError(f"{location} {describe_missing_field(fields, missing, present)}")


def describe_missing_field(fields: Fields, missing: str, present: Iterable[str], where: str = "") -> str:
    """Return the predicate of an error message. `where` is e.g. " in line 2"."""
    names = ", ".join(map(repr, present)) or "none"
    return f"has no field {missing!r}, it has {names}{where}: choose another {fields.key(missing)}"
