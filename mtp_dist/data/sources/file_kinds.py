"""The kind of a file, recognized by its content and suffix; files that are not text are refused."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from mtp_dist.data.sources.fields import Fields
from mtp_dist.data.sources.work_units import describe_missing_field
from mtp_dist.errors import DataError

Kind = Literal["text", "JSON lines", "JSON array", "CSV", "Parquet"]
Compression = Literal["gzip", "bzip2", "xz", "zstd"]

HEAD_BYTES = 8 << 10
JSON_HEAD_BYTES = 4 << 20
"""Bytes read of a file that starts like JSON, to check that it consists of records."""

MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4")
BINARY_MAGIC = (b"%PDF-", b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!", b"\x04\x22\x4d\x18")
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
UTF8_BOM = b"\xef\xbb\xbf"
CONTROL_CHARACTERS = bytes({*range(32), 127} - {*b"\b\t\n\v\f\r\x1b"})

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = (".csv", ".tsv")
BETWEEN_RECORDS = re.compile(r"[\s,]*")
DATA_SUFFIXES = ("", ".json", ".txt")
"""Suffixes of files that are refused, not read as text, if their records do not have the field."""


@dataclass(frozen=True)
class FileKind:
    kind: Kind
    compression: Compression | None = None
    delimiter: str = ","
    """Delimiter of a CSV file."""


class UnreadableFileError(Exception):
    """The error for a file without readable text."""

    def __init__(self, reason: str, sentence: str) -> None:
        """Take the label used in counts of skipped files, and the text that follows the file's name in an error."""
        super().__init__(sentence)
        self.reason = reason


def recognize(file: Path, fields: Fields) -> FileKind:
    """Return a file's kind. Raise UnreadableFileError, OSError, or DataError if its compressed data is corrupt."""
    if not file.is_file():
        return FileKind("text")  # a pipe can be read only once
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    compression = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    suffix = _uncompressed_suffix(file)
    if suffix in ARCHIVE_SUFFIXES:
        raise UnreadableFileError("archive", "is an archive: unpack it")
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return FileKind("Parquet")
    if suffix in JSON_LINES_SUFFIXES:
        return FileKind("JSON lines", compression)
    head, cut = _read_head(file, compression)
    _check_text(head[:HEAD_BYTES])
    if suffix in TABLE_SUFFIXES:
        return FileKind("CSV", compression, delimiter="\t" if suffix == ".tsv" else ",")
    if records := _record_kind(head, cut, fields, suffix):
        return FileKind(records, compression)
    if compression:
        raise UnreadableFileError("compressed", "is compressed: decompress it (only records are read compressed)")
    return FileKind("text")


def kind_by_name(file: Path) -> FileKind:
    """Return the kind that the name alone implies: all that positions in older checkpoints depend on."""
    if file.name.endswith((".jsonl", ".ndjson")):
        return FileKind("JSON lines")
    if file.name.endswith((".jsonl.gz", ".ndjson.gz", ".json.gz")):
        return FileKind("JSON lines", "gzip")
    return FileKind("Parquet" if file.name.endswith(".parquet") else "text")


def _uncompressed_suffix(file: Path) -> str:
    """Return the lower-case suffix below that of a compression: `.json` for `a.JSON.gz`."""
    path = Path(file.name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path).suffix


def _read_head(file: Path, compression: Compression | None) -> tuple[bytes, bool]:
    """Return the start of the content, longer if it looks like JSON, and whether such content continues after it."""
    with open_decompressed(file, compression) as (_, content), reading_compressed(file, compression):
        head = content.read(HEAD_BYTES)
        if head.removeprefix(UTF8_BOM).lstrip()[:1] not in (b"{", b"["):
            return head, False
        more = content.read(JSON_HEAD_BYTES)
    return head + more, len(more) == JSON_HEAD_BYTES


def _check_text(head: bytes) -> None:
    """Raise UnreadableFileError if a file that starts with `head` is not text in an ASCII-based encoding."""
    if head.startswith(UTF16_BOMS):
        raise UnreadableFileError("UTF-16", "is UTF-16: convert it to UTF-8")
    binary = b"\0" in head or head.startswith(BINARY_MAGIC)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # accepts a character cut at the end
    except UnicodeDecodeError:
        # Text in a legacy encoding does not have control characters either.
        binary = binary or head.translate(None, CONTROL_CHARACTERS) != head
    if binary:
        raise UnreadableFileError("binary", "is binary, not text: leave it out or convert it")


def _record_kind(head: bytes, cut: bool, fields: Fields, suffix: str) -> Kind | None:
    """Return None for text. Raise UnreadableFileError for JSON without records that have the fields.

    `cut`: the file is longer than `head`.
    """
    text = head.removeprefix(UTF8_BOM).decode(errors="surrogateescape")
    first = text.lstrip()[:1]
    if not first:
        return "JSON lines" if suffix == ".json" else None
    kind: Kind = "JSON array" if first == "[" else "JSON lines"
    try:
        records = list(_array_records(text, cut) if first == "[" else _line_records(text, cut))
    except (ValueError, RecursionError):
        records = [("", None)]
    if not all(isinstance(record, dict) for _, record in records) or first not in ("{", "["):
        if suffix == ".json":
            raise UnreadableFileError(
                "JSON without records",
                "is JSON, but neither one object per line nor an array of objects: convert it to one of these",
            )
        return None
    if not records:
        return kind if suffix == ".json" else None
    for location, record in records:
        if missing := fields.missing(record):
            if suffix not in DATA_SUFFIXES:
                return None
            raise missing_field_file_error("JSON", fields, missing, record, f" in {location}")
    return kind


def missing_field_file_error(
    kind: str, fields: Fields, missing: str, present: Iterable[str], where: str = ""
) -> UnreadableFileError:
    """Return the error for a file of records without the field. `where` is e.g. " in line 2"."""
    return UnreadableFileError(
        f"{kind} without the field {missing!r}", describe_missing_field(fields, missing, present, where)
    )


def _line_records(text: str, cut: bool) -> Iterator[tuple[str, Any]]:
    """Yield the location and record of each line. Raise ValueError if a line is not JSON."""
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1] if cut else lines, 1):
        if line.strip():
            yield f"line {number}", json.loads(line)


def _array_records(text: str, cut: bool) -> Iterator[tuple[str, Any]]:
    """Yield the location and value of each element of an array. Raise ValueError if it is not JSON."""
    if not cut:
        yield from ((f"row {number}", record) for number, record in enumerate(json.loads(text)))
        return
    position = text.index("[") + 1
    for number in itertools.count():
        position = cast(re.Match[str], BETWEEN_RECORDS.match(text, position)).end()
        try:
            record, position = json.JSONDecoder().raw_decode(text, position)
        except ValueError:  # `text` ends here
            return
        yield f"row {number}", record


@contextmanager
def open_decompressed(file: Path, compression: Compression | None) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open the raw file, whose position measures progress, and its decompressed content."""
    with file.open("rb") as raw:
        if compression is None:
            yield raw, raw
        elif compression == "zstd":
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as stream:
                yield raw, cast(IO[bytes], io.BufferedReader(stream))
        else:
            openers: dict[Compression, Callable[[IO[bytes]], Any]] = {
                "gzip": gzip.open,
                "bzip2": bz2.open,
                "xz": lzma.open,
            }
            with openers[compression](raw) as stream:
                yield raw, stream


@contextmanager
def reading_compressed(file: Path, compression: Compression | None) -> Iterator[None]:
    """Turn the libraries' errors for corrupt data into DataError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if compression is None or (isinstance(error, OSError) and error.errno):
            raise
        raise DataError(f"{file} is truncated or not a valid {compression} file ({error}): copy it again") from None
