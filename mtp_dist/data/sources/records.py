"""Work units of files of records: JSON lines, JSON arrays, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from mtp_dist.data.sources.fields import Fields
from mtp_dist.data.sources.file_kinds import (
    UTF8_BOM,
    FileKind,
    missing_field_file_error,
    open_decompressed,
    reading_compressed,
)
from mtp_dist.data.sources.work_units import (
    LineList,
    LineRange,
    RowGroups,
    WorkUnit,
    parse_record,
    row_lists,
    row_location,
)
from mtp_dist.errors import DataError


def record_units(file: Path, kind: FileKind, size: int, fields: Fields, unit_bytes: int) -> Iterator[WorkUnit]:
    """Yield the units of a file of `size` bytes of records, whose columns were checked.

    Raise DataError or OSError if it cannot be read.
    """
    if kind.kind == "Parquet":
        return _row_groups(file, size, fields, unit_bytes)
    if kind.kind == "CSV":
        return row_lists(str(file), _csv_rows(file, kind, fields), unit_bytes)
    if kind.kind == "JSON array":
        return row_lists(str(file), _array_rows(file, kind, size, fields), unit_bytes)
    if kind.compression:
        return _line_lists(file, kind, fields, unit_bytes)
    return _line_ranges(file, size, fields, unit_bytes)


def _line_ranges(file: Path, size: int, fields: Fields, unit_bytes: int) -> Iterator[WorkUnit]:
    for start in range(0, size, unit_bytes):
        end = min(size, start + unit_bytes)
        yield LineRange(file, start, end, fields, size=end - start)


def _line_lists(file: Path, kind: FileKind, fields: Fields, unit_bytes: int) -> Iterator[WorkUnit]:
    with open_decompressed(file, kind.compression) as (raw, stream):
        lines_before = position = 0
        while True:
            with reading_compressed(file, kind.compression):
                lines = stream.readlines(unit_bytes)
            if not lines:
                return
            yield LineList(file, lines_before, tuple(lines), fields, size=raw.tell() - position)
            position = raw.tell()
            lines_before += len(lines)


def check_columns(file: Path, kind: FileKind, fields: Fields) -> None:
    """Raise UnreadableFileError if a table lacks a field, DataError or OSError if it cannot be read."""
    columns = None
    if kind.kind == "Parquet":
        columns = _parquet_metadata(file).schema.to_arrow_schema().names
    elif kind.kind == "CSV":
        with closing(_csv_lines(file, kind)) as lines:
            columns, _, _ = next(lines, (None, 0, 0))
    if columns is not None and (missing := fields.missing(columns)):
        raise missing_field_file_error(kind.kind, fields, missing, columns)


def _csv_rows(file: Path, kind: FileKind, fields: Fields) -> Iterator[tuple[bytes, int]]:
    lines = _csv_lines(file, kind)
    header, _, _ = next(lines, ([], 0, 0))
    for name in fields.names:
        if header.count(name) > 1:
            raise DataError(f"{file} has {header.count(name)} fields {name!r}: rename all but one")
    for number, (row, line, position) in enumerate(lines):
        if len(row) != len(header):
            raise DataError(f"{file}, line {line} has {len(row)} fields, the header has {len(header)}: fix it")
        location = partial(row_location, file, number)
        yield fields.document([row[header.index(name)] for name in fields.names], location), position


def _csv_lines(file: Path, kind: FileKind) -> Generator[tuple[list[str], int, int]]:
    """Yield the fields, the number and the position after it of each line that is not blank."""
    csv.field_size_limit(sys.maxsize)  # documents may exceed the library's limit of 128 KiB
    with open_decompressed(file, kind.compression) as (raw, content):
        # Bytes that are not UTF-8 are kept, as in JSON lines.
        text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=kind.delimiter, strict=True)
        while True:
            try:
                with reading_compressed(file, kind.compression):
                    row = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{file}, line {reader.line_num} is not valid CSV ({error}): fix it") from None
            if row is None:
                return
            if row:
                yield row, reader.line_num, raw.tell()


def _array_rows(file: Path, kind: FileKind, size: int, fields: Fields) -> Iterator[tuple[bytes, int]]:
    """Yield the documents of a JSON array, which must be read as a whole."""
    with open_decompressed(file, kind.compression) as (_, stream), reading_compressed(file, kind.compression):
        content = stream.read().removeprefix(UTF8_BOM)
    try:
        records = json.loads(content.decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise DataError(f"{file} is not valid JSON ({reason}): fix it") from None
    for number, record in enumerate(records):
        location = partial(row_location, file, number)
        yield parse_record(record, fields, location), size * (number + 1) // len(records)


def _parquet_metadata(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is not a valid Parquet file ({error}): copy it again") from None
    except OSError as error:  # without a file name
        raise DataError(f"cannot read {file} ({error.strerror or error})") from None


def _row_groups(file: Path, size: int, fields: Fields, unit_bytes: int) -> Iterator[WorkUnit]:
    metadata = _parquet_metadata(file)
    schema = metadata.schema.to_arrow_schema()
    for name in fields.names:
        if (number := schema.names.count(name)) > 1:
            raise DataError(f"{file} has {number} fields {name!r}: rename all but one, or choose another field")
        kind = schema.field(name).type
        if not fields.chat_template and not any(is_text(kind) for is_text in _text_types()):
            raise DataError(f"{file}: the field {name!r} is not text but {kind}: choose another field")
    columns = [i for i in range(metadata.num_columns) if _is_part_of(metadata.schema.column(i).path, fields)]
    groups: list[int] = []
    text_bytes = rows = rows_before = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        text_bytes += sum(metadata.row_group(group).column(column).total_uncompressed_size for column in columns)
        rows += metadata.row_group(group).num_rows
        if text_bytes >= unit_bytes or group == metadata.num_row_groups - 1:
            yield RowGroups(file, tuple(groups), rows_before, fields, size=size * rows // max(1, metadata.num_rows))
            rows_before += rows
            groups, text_bytes, rows = [], 0, 0


def _is_part_of(path: str, fields: Fields) -> bool:
    """Return whether a column is a field, or a part of the messages in it."""
    return any(path == name or path.startswith(f"{name}.") for name in fields.names)


def _text_types() -> list[Any]:
    from pyarrow import types

    return [types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary]
