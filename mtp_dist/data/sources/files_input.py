"""Files on disk as an input."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_dist.data.sources.fields import Fields
from mtp_dist.data.sources.file_kinds import FileKind, UnreadableFileError, kind_by_name, recognize
from mtp_dist.data.sources.input import UNIT_BYTES, UNSPLIT, FileCounts, Input, Shard, sha256_of_json
from mtp_dist.data.sources.records import check_columns, record_units
from mtp_dist.data.sources.work_units import WholeFiles, WorkUnit
from mtp_dist.errors import DataError


class FilesInput(Input):
    """Files on disk; a file without records is one document."""

    def __init__(self, files: Sequence[Path], fields: Fields, skipped_entries: Counter[str] | None = None) -> None:
        """Recognize the kind of each file.

        skipped_entries: counts by reason in a folder; None if the user named the file, which must be readable.
        """
        self._fields = fields
        self._skipped_entries = skipped_entries
        self.files = FileCounts()
        self._files = [(file, file.stat(), self._recognize(file)) for file in files]
        self.total = sum(stat.st_size for _, stat, _ in self._files)

    def identity(self) -> list[Any]:
        return [
            [str(file), stat.st_size, stat.st_mtime_ns, *_kind_beyond_name(file, kind)]
            for file, stat, kind in self._files
        ]

    def fingerprint(self) -> str:
        """Hash names, sizes and kinds, not folders and times, so that it is the same on every machine."""
        return sha256_of_json(
            [[file.name, stat.st_size, *_kind_beyond_name(file, kind)] for file, stat, kind in self._files]
        )

    def documents(self, position: Any, shard: Shard = UNSPLIT) -> Iterator[tuple[Any, bytes]]:
        """Yield the documents of every num_shards-th work unit."""
        start = tuple(position or (0, 0))
        source = str(self._files[0][0])
        try:
            for number, unit in enumerate(self.units(UNIT_BYTES)):
                source = unit.source
                if number < start[0] or number % shard.num_shards != shard.index:
                    continue
                for index, document in enumerate(unit.documents()):
                    if (number, index) >= start:
                        yield [number, index], document
        except OSError as error:
            raise DataError(f"cannot read {error.filename or source} ({error.strerror or error})") from None

    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        self.files = FileCounts(skipped=Counter(self._skipped_entries))
        texts: list[Path] = []
        text_size = 0
        for file, stat, kind in self._files:
            if isinstance(kind, UnreadableFileError):
                self.files.skip(file, kind.reason)
                continue
            self.files.read[kind.kind] += 1
            if is_text := kind.kind == "text":
                texts.append(file)
                text_size += stat.st_size
            if texts and (not is_text or text_size >= unit_bytes):
                yield WholeFiles(tuple(texts), size=text_size)
                texts, text_size = [], 0
            if not is_text:
                yield from record_units(file, kind, stat.st_size, self._fields, unit_bytes)
        if texts:
            yield WholeFiles(tuple(texts), size=text_size)

    def _recognize(self, file: Path) -> FileKind | UnreadableFileError:
        """Return a file's kind; for a file of a folder, the reason to skip it."""
        try:
            kind = recognize(file, self._fields)
            check_columns(file, kind, self._fields)
            if kind.kind == "text" and self._fields.need_records:
                fields = " and ".join(map(repr, self._fields.names))
                fields = f"field{'s' * (len(self._fields.names) > 1)} {fields}"
                raise UnreadableFileError(
                    "text without records", f"is text, not records with the {fields}: convert it to JSON lines"
                )
            return kind
        except UnreadableFileError as error:
            if self._skipped_entries is None:
                raise DataError(f"{file} {error}") from None
            return error
        except OSError as error:
            raise DataError(f"cannot read {file} ({error.strerror or error})") from None


def _kind_beyond_name(file: Path, kind: FileKind | UnreadableFileError) -> list[Any]:
    """Return as JSON a kind that the name does not imply: it decides which work units there are."""
    if isinstance(kind, UnreadableFileError):
        return ["skipped"]
    return [] if kind == kind_by_name(file) else [kind.kind, kind.compression]
