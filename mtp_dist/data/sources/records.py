"""Work units of files of records: JSON lines, JSON arrays, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mtp_dist.config import ConfigError
from mtp_dist.data.documents import (
    LineList,
    LineRange,
    RowGroups,
    RowList,
    WorkUnit,
    bytes_of_text,
    document_of_record,
    missing_field,
    row_place,
)
from mtp_dist.data.sources.kinds import UTF8_MARK, FileKind, open_decompressed, reading_compressed


def record_units(file: Path, kind: FileKind, size: int, field: str, unit_bytes: int) -> Iterator[WorkUnit]:
    """Yield the units of a file of records of `size` bytes. Raise ConfigError or OSError if it cannot be read."""
    if kind.kind == "Parquet":
        return _row_groups(file, size, field, unit_bytes)
    if kind.kind == "CSV":
        return _rows(file, _csv_rows(file, kind, field), unit_bytes)
    if kind.kind == "JSON array":
        return _rows(file, _array_rows(file, kind, size, field), unit_bytes)
    return (
        _line_lists(file, kind, field, unit_bytes) if kind.compression else _line_ranges(file, size, field, unit_bytes)
    )


def _line_ranges(file: Path, size: int, field: str, unit_bytes: int) -> Iterator[WorkUnit]:
    for start in range(0, size, unit_bytes):
        end = min(size, start + unit_bytes)
        yield LineRange(file, start, end, field, size=end - start)


def _line_lists(file: Path, kind: FileKind, field: str, unit_bytes: int) -> Iterator[WorkUnit]:
    with open_decompressed(file, kind.compression) as (raw, stream):
        lines_before = position = 0
        while True:
            with reading_compressed(file, kind.compression):
                lines = stream.readlines(unit_bytes)
            if not lines:
                return
            yield LineList(file, lines_before, tuple(lines), field, size=raw.tell() - position)
            position = raw.tell()
            lines_before += len(lines)


def _rows(file: Path, rows: Iterator[tuple[bytes, int]], unit_bytes: int) -> Iterator[WorkUnit]:
    """Yield units of rows, each of them with the position in the file after it."""
    texts: list[bytes] = []
    text_bytes = rows_before = begin = position = 0
    for text, position in rows:
        texts.append(text)
        text_bytes += len(text)
        if text_bytes >= unit_bytes:
            yield RowList(str(file), rows_before, tuple(texts), size=position - begin)
            rows_before, begin = rows_before + len(texts), position
            texts, text_bytes = [], 0
    if texts:
        yield RowList(str(file), rows_before, tuple(texts), size=position - begin)


def _csv_rows(file: Path, kind: FileKind, field: str) -> Iterator[tuple[bytes, int]]:
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the 128 KiB that the library allows
    with open_decompressed(file, kind.compression) as (raw, content):
        # Bytes that are not UTF-8 come out as they went in, as for JSON lines.
        text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=kind.delimiter, strict=True)
        rows = _read_csv(file, kind, reader)
        header = next(rows, None)
        if header is None:
            return
        if header.count(field) > 1:
            raise ConfigError(f"{file} has {header.count(field)} fields {field!r}: rename all but one")
        if field not in header:
            raise missing_field(str(file), field, header)
        column = header.index(field)
        for number, row in enumerate(rows):
            if len(row) != len(header):
                raise ConfigError(
                    f"{file}, line {reader.line_num} has {len(row)} fields, the header has {len(header)}: fix it"
                )
            yield bytes_of_text(row[column], field, partial(row_place, file, number)), raw.tell()


def _read_csv(file: Path, kind: FileKind, reader: Any) -> Iterator[list[str]]:
    """Yield the lines that are not blank."""
    while True:
        try:
            with reading_compressed(file, kind.compression):
                row = next(reader, None)
        except csv.Error as error:
            raise ConfigError(f"{file}, line {reader.line_num} is not CSV that can be read ({error}): fix it") from None
        if row is None:
            return
        if row:
            yield row


def _array_rows(file: Path, kind: FileKind, size: int, field: str) -> Iterator[tuple[bytes, int]]:
    """Yield the documents of a JSON array, which has to be read as a whole."""
    with open_decompressed(file, kind.compression) as (_, stream), reading_compressed(file, kind.compression):
        content = stream.read().removeprefix(UTF8_MARK)
    try:
        records = json.loads(content.decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{file} is not JSON that can be read ({reason}): fix it") from None
    for number, record in enumerate(records):
        place = partial(row_place, file, number)
        yield document_of_record(record, field, place), size * (number + 1) // len(records)


def _row_groups(file: Path, size: int, field: str, unit_bytes: int) -> Iterator[WorkUnit]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{file} is no whole Parquet file ({error}): give it anew") from None
    except OSError as error:  # which has no name
        raise ConfigError(f"cannot read {file} ({error.strerror or error})") from None
    schema = metadata.schema.to_arrow_schema()
    if field not in schema.names:
        raise missing_field(str(file), field, schema.names)
    if (columns := schema.names.count(field)) > 1:
        raise ConfigError(f"{file} has {columns} fields {field!r}: rename all but one, or choose another field")
    kind = schema.field(field).type
    if not any(is_text(kind) for is_text in _text_types()):
        raise ConfigError(f"{file}: the field {field!r} is not text but {kind}: choose another field")
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == field)
    groups: list[int] = []
    text_bytes = rows = rows_before = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        text_bytes += metadata.row_group(group).column(column).total_uncompressed_size
        rows += metadata.row_group(group).num_rows
        if text_bytes >= unit_bytes or group == metadata.num_row_groups - 1:
            yield RowGroups(file, tuple(groups), rows_before, field, size=size * rows // max(1, metadata.num_rows))
            rows_before += rows
            groups, text_bytes, rows = [], 0, 0


def _text_types() -> list[Any]:
    from pyarrow import types

    return [types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary]
