"""What a file is: recognized by its content and its suffix, or refused."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from mtp_dist.config import ConfigError

Kind = Literal["text", "JSON lines", "JSON array", "CSV", "Parquet"]
Compression = Literal["gzip", "bzip2", "xz", "zstd"]

HEAD_BYTES = 8 << 10
FIRST_RECORD_BYTES = 4 << 20
"""Read of a file that begins like JSON, to find its first record."""

MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
ARCHIVE_SUFFIXES = (".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4")
BINARY_MAGIC = (b"%PDF-", b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!", b"\x04\x22\x4d\x18")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK = b"\xef\xbb\xbf"
CONTROL_CHARACTERS = bytes({*range(32), 127} - {*b"\b\t\n\v\f\r\x1b"})

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = (".csv", ".tsv")
DATA_SUFFIXES = ("", ".json", ".txt")
"""Of files which are not read as text if they are records without the field."""


@dataclass(frozen=True)
class FileKind:
    kind: Kind
    compression: Compression | None = None
    delimiter: str = ","
    """Of a CSV file."""


class UnreadableFileError(Exception):
    """A file has no text that can be read."""

    def __init__(self, reason: str, sentence: str) -> None:
        """`reason` is for counts, `sentence` follows the file's name."""
        super().__init__(sentence)
        self.reason = reason


def recognize(file: Path, field: str) -> FileKind:
    """Return what the file is. Raise UnreadableFileError, OSError, or ConfigError if its compressed data is damaged."""
    if not file.is_file():
        return FileKind("text")  # a pipe, which can be read only once
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    compression = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    suffix = _suffix_of_content(file)
    if suffix in ARCHIVE_SUFFIXES:
        raise UnreadableFileError("archive", "is an archive: unpack it")
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return FileKind("Parquet")
    if suffix in JSON_LINES_SUFFIXES:
        return FileKind("JSON lines", compression)
    head = _read_head(file, compression)
    _check_text(head)
    if suffix in TABLE_SUFFIXES:
        return FileKind("CSV", compression, delimiter="\t" if suffix == ".tsv" else ",")
    if records := _kind_of_records(head, field, suffix):
        return FileKind(records, compression)
    if compression:
        raise UnreadableFileError("compressed", "is compressed: decompress it (only records are read compressed)")
    return FileKind("text")


def _suffix_of_content(file: Path) -> str:
    """Return the suffix in lower case, without that of a compression: `.json` for `a.JSON.gz`."""
    path = Path(file.name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path).suffix


def _read_head(file: Path, compression: Compression | None) -> bytes:
    """Read the beginning of the content, up to the end of the first record if it looks like JSON."""
    with open_decompressed(file, compression) as (_, content), reading_compressed(file, compression):
        head = content.read(HEAD_BYTES)
        begin = head.removeprefix(UTF8_MARK).lstrip()[:1]
        if begin == b"{" and b"\n" not in head:
            head += content.readline(FIRST_RECORD_BYTES)
        elif begin == b"[":
            head += content.read(FIRST_RECORD_BYTES)
    return head


def _check_text(head: bytes) -> None:
    """Raise UnreadableFileError if a file that begins with `head` is not text with ASCII as part of its encoding."""
    if head.startswith(UTF16_MARKS):
        raise UnreadableFileError("UTF-16", "is UTF-16: convert it to UTF-8")
    binary = b"\0" in head or head.startswith(BINARY_MAGIC)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # which accepts a character that is cut at the end
    except UnicodeDecodeError:
        # Text in an older encoding has no control characters either.
        binary = binary or head.translate(None, CONTROL_CHARACTERS) != head
    if binary:
        raise UnreadableFileError("binary", "is binary, not text: leave it out, or convert it to text")


def _kind_of_records(head: bytes, field: str, suffix: str) -> Kind | None:
    """Return None for text. Raise UnreadableFileError for JSON that holds no records with the field."""
    text = head.removeprefix(UTF8_MARK).decode(errors="surrogateescape").lstrip()
    if not text:
        return "JSON lines" if suffix == ".json" else None
    kind, first = _first_record(text)
    if kind is None:
        if suffix == ".json":
            raise UnreadableFileError(
                "JSON without records",
                "is JSON, but neither one object per line nor an array of objects: convert it to one of these",
            )
        return None
    if not first or field in first:
        return kind
    if suffix not in DATA_SUFFIXES:
        return None
    present = ", ".join(map(repr, first))
    raise UnreadableFileError(
        f"JSON without the field {field!r}", f"has no field {field!r}, it has {present}: choose another field"
    )


def _first_record(text: str) -> tuple[Kind | None, dict[str, Any]]:
    """Return the kind of records that text is, None if there are none, and the first one if it is known."""
    first: object = None
    kind: Kind = "JSON array" if text[0] == "[" else "JSON lines"
    try:
        if text[0] == "[":
            begin = text[1:].lstrip()
            if begin.startswith("]"):
                return kind, {}
            if begin.startswith("{"):
                first, _ = json.JSONDecoder().raw_decode(begin)
        elif text[0] == "{":
            first = json.loads(text.partition("\n")[0])
    except (ValueError, RecursionError):
        return (kind, {}) if len(text) >= FIRST_RECORD_BYTES else (None, {})
    return (kind, first) if isinstance(first, dict) else (None, {})


@contextmanager
def open_decompressed(file: Path, compression: Compression | None) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open the file as it is, whose position tells how much of it is read, and its content."""
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
    """Turn what the libraries raise for damaged data into ConfigError."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if compression is None or (isinstance(error, OSError) and error.errno):
            raise
        raise ConfigError(f"{file} is not a complete {compression} file ({error}): copy it again") from None
