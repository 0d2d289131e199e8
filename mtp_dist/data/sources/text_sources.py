"""From what the user names to work units: always the same units for the same files and options."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from mtp_dist.data.sources.file_kinds import FileKind, UnreadableFileError, kind_by_name, recognize
from mtp_dist.data.sources.folders import files_below
from mtp_dist.data.sources.hub import check_dataset_name
from mtp_dist.data.sources.python_stdlib import PYTHON_STDLIB, Split, in_validation_split, stdlib_files
from mtp_dist.data.sources.records import check_columns, record_units
from mtp_dist.data.sources.work_units import RowList, WholeFiles, WorkUnit, bytes_of_text, missing_field, row_place
from mtp_dist.errors import ConfigError

UNIT_BYTES = 2 << 20
"""Text of one work unit, about: a second of work, so that at the end no process waits long for the last one."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class InputOptions:
    field: str = "text"
    """Of each record of JSONL, Parquet and datasets."""
    glob: str | None = None
    """Which files of a folder."""
    subset: str | None = None
    """Of a dataset that has several."""
    split: str | None = None
    """Of a dataset, `train` when absent; of a folder or python-stdlib `all`, `train` or `validation`."""
    streaming: bool = False
    """Read a dataset while it is being downloaded."""
    key: str | None = None
    """Of the source in the configuration, such as `data.train.0`; None on the command line."""

    def named(self, name: str | Path) -> str:
        """How errors speak of an input."""
        return f"{self.key}.path = '{name}'" if self.key else f"INPUT '{name}'"

    def option(self, option: str) -> str:
        """How errors speak of an option."""
        return f"{self.key}.{option}" if self.key else f"--{option}"


@dataclass
class FileCounts:
    """What files became."""

    read: Counter[str] = field(default_factory=Counter)
    """Files by kind."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files by reason."""
    first_skipped: str | None = None

    def skip(self, file: Path, reason: str) -> None:
        self.skipped[reason] += 1
        self.first_skipped = self.first_skipped or str(file)

    def add(self, other: FileCounts) -> None:
        self.read += other.read
        self.skipped += other.skipped
        self.first_skipped = self.first_skipped or other.first_skipped

    def as_json(self) -> dict[str, Any]:
        return {
            "read": dict(sorted(self.read.items())),
            "skipped": dict(sorted(self.skipped.items())),
            "first_skipped": self.first_skipped,
        }

    def describe(self) -> list[str]:
        """Return a line about the files that were read, and one about those that were skipped if there are any."""
        lines = []
        for what, counts in (("", self.read), (" skipped", self.skipped)):
            if total := counts.total():
                kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(counts.items()))
                lines.append(f"{total:,} files{what}: {kinds}")
        if self.first_skipped:
            lines[-1] += f"; the first: {self.first_skipped}"
        return lines


@dataclass(frozen=True)
class Shard:
    """One of the parts that an input is split into, the same on every machine."""

    index: int
    number_of: int

    def __str__(self) -> str:
        return f"shard {self.index} of {self.number_of}"


WHOLE = Shard(0, 1)


class Input(ABC):
    total: int | None
    """Sum of the units' sizes, None where nobody knows it before the end."""
    files: FileCounts
    """What the files became, as far as the units were read; empty for datasets."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """What must be the same when a killed `prepare` goes on, as JSON: the name first in each item."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of what tells these documents from others without reading them."""

    @abstractmethod
    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        """The work units in their order. Raises ConfigError or OSError where an input cannot be read."""

    @abstractmethod
    def documents(self, position: Any, shard: Shard = WHOLE) -> Iterator[tuple[Any, bytes]]:
        """Yield a shard's documents from a position on, all of them from None, each with its own position, as JSON.

        Raise ConfigError if the input cannot be read, or cannot be split into so many shards.
        """


def open_inputs(names: Sequence[str], options: InputOptions) -> list[Input]:
    """Raises ConfigError for an input that is missing, unreadable, or needs another option."""
    if options.glob is not None and not any(Path(name).is_dir() for name in names):
        raise ConfigError(f"{options.option('glob')} {options.glob!r} chooses files of a folder: leave it out")
    return [_open_input(name, options) for name in names]


def _open_input(name: str, options: InputOptions) -> Input:
    path = Path(name)
    if name == PYTHON_STDLIB:
        return FilesInput(stdlib_files(_hashed_split(options)), options.field, Counter())
    if path.is_dir() and not _is_saved_dataset(path):
        return _files_of_folder(path, options)
    if path.exists() and not path.is_dir():
        if options.split:
            raise ConfigError(
                f"{options.option('split')} = '{options.split}' chooses a part of a dataset or folder, '{name}' is one "
                "file: leave it out"
            )
        return FilesInput([path], options.field)
    in_a_folder_here = path.parent != Path() and path.parent.is_dir()
    if not path.is_dir():
        check_dataset_name("" if in_a_folder_here else name, options.named(name))
    return DatasetInput(name, options)


def _hashed_split(options: InputOptions) -> Split:
    split = options.split or "all"
    if split not in ("all", "train", "validation"):
        raise ConfigError(f"{options.option('split')} = '{split}' is not known for files: use 'train' or 'validation'")
    return cast(Split, split)


def _is_saved_dataset(folder: Path) -> bool:
    """By `save_to_disk` of the datasets library."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _files_of_folder(folder: Path, options: InputOptions) -> FilesInput:
    """The files in the order of their POSIX relative paths."""
    if options.glob is None:
        raise ConfigError(
            f"{options.named(folder)} is a folder: say which of its files with {options.option('glob')}, such as "
            "'**/*.py'"
        )
    try:
        files, skipped = files_below(folder, options.glob)
    except ValueError as error:
        raise ConfigError(f"{options.option('glob')} {options.glob!r} is not a valid pattern: {error}") from None
    split = _hashed_split(options)
    chosen = [
        file
        for name, file in sorted(files.items())
        if split == "all" or in_validation_split(name) == (split == "validation")
    ]
    if not chosen:
        raise ConfigError(
            f"{options.named(folder)} has no file for {options.option('glob')} {options.glob!r} and "
            f"{options.option('split')} '{split}': give others"
        )
    return FilesInput(chosen, options.field, skipped)


class FilesInput(Input):
    """Files on a disk; what is not a file of records is one document."""

    def __init__(self, files: Sequence[Path], field: str, skipped_entries: Counter[str] | None = None) -> None:
        """`skipped_entries` of a folder, by reason; None for a file that was named, which must be readable."""
        self._paths = list(files)
        self._field = field
        self._skipped_entries = skipped_entries
        self.files = FileCounts()
        self._stats = [file.stat() for file in self._paths]
        self._kinds = [self._recognize(file) for file in self._paths]
        self.total = sum(stat.st_size for stat in self._stats)

    def identity(self) -> list[Any]:
        return [
            [str(file), stat.st_size, stat.st_mtime_ns, *_more_than_its_name(file, kind)]
            for file, stat, kind in zip(self._paths, self._stats, self._kinds, strict=True)
        ]

    def fingerprint(self) -> str:
        """Return the hash of names, sizes and kinds, not of folders and times: it is the same on every machine."""
        return _sha256(
            [
                [file.name, stat.st_size, *_more_than_its_name(file, kind)]
                for file, stat, kind in zip(self._paths, self._stats, self._kinds, strict=True)
            ]
        )

    def documents(self, position: Any, shard: Shard = WHOLE) -> Iterator[tuple[Any, bytes]]:
        """Yield the documents of every work unit whose number has the shard's remainder."""
        start = tuple(position or (0, 0))
        source = str(self._paths[0])
        try:
            for number, unit in enumerate(self.units(UNIT_BYTES)):
                source = unit.source
                if number < start[0] or number % shard.number_of != shard.index:
                    continue
                for index, document in enumerate(unit.documents()):
                    if (number, index) >= start:
                        yield [number, index], document
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename or source} ({error.strerror or error})") from None

    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        self.files = FileCounts(skipped=Counter(self._skipped_entries))
        whole: list[Path] = []
        whole_size = 0
        for file, stat, kind in zip(self._paths, self._stats, self._kinds, strict=True):
            if isinstance(kind, UnreadableFileError):
                self.files.skip(file, kind.reason)
                continue
            self.files.read[kind.kind] += 1
            if is_text := kind.kind == "text":
                whole.append(file)
                whole_size += stat.st_size
            if whole and (not is_text or whole_size >= unit_bytes):
                yield WholeFiles(tuple(whole), size=whole_size)
                whole, whole_size = [], 0
            if not is_text:
                yield from record_units(file, kind, stat.st_size, self._field, unit_bytes)
        if whole:
            yield WholeFiles(tuple(whole), size=whole_size)

    def _recognize(self, file: Path) -> FileKind | UnreadableFileError:
        """Return what the file is; why it is skipped if it is one of a folder."""
        try:
            kind = recognize(file, self._field)
            check_columns(file, kind, self._field)
            return kind
        except UnreadableFileError as error:
            if self._skipped_entries is None:
                raise ConfigError(f"{file} {error}") from None
            return error
        except OSError as error:
            raise ConfigError(f"cannot read {file} ({error.strerror or error})") from None


def _more_than_its_name(file: Path, kind: FileKind | UnreadableFileError) -> list[Any]:
    """Return the kind of a file if its name does not imply it, as JSON: it decides which work units there are."""
    if isinstance(kind, UnreadableFileError):
        return ["skipped"]
    return [] if kind == kind_by_name(file) else [kind.kind, kind.compression]


class DatasetInput(Input):
    """A dataset of the Hugging Face library, by its name or the folder it was saved to."""

    def __init__(self, name: str, options: InputOptions) -> None:
        """Raises ConfigError where it cannot be loaded."""
        self._name = name
        self._options = options
        self._named = options.named(name)
        self._field = options.field
        self._subset = options.subset
        self._split = options.split or "train"
        self.dataset = load_dataset(name, options)
        self.total = None if options.streaming else len(self.dataset)
        self.files = FileCounts()
        columns = self.dataset.column_names
        if columns is not None and options.field not in columns:
            raise missing_field(self._named, options.field, columns)

    def identity(self) -> list[Any]:
        fingerprint = None if self._options.streaming else self.dataset._fingerprint
        return [[self._name, self._subset, self._split, fingerprint]]

    def fingerprint(self) -> str:
        return _sha256(self.identity())

    def documents(self, position: Any, shard: Shard = WHOLE) -> Iterator[tuple[Any, bytes]]:
        """Yield the documents of a part of a saved dataset, or of some of a streamed one's files."""
        dataset = self._sharded(shard)
        if position is not None:
            dataset.load_state_dict(position)
        rows = iter(dataset)
        while True:
            before = dataset.state_dict()
            try:
                row = next(rows, None)
            except Exception as error:  # whatever the dataset's own code, its files and the network raise
                raise ConfigError(f"{self._named}: the datasets library cannot read on: {_first_line(error)}") from None
            if row is None:
                return
            if self._field not in row:
                raise missing_field(self._named, self._field, row)
            yield before, bytes_of_text(row[self._field], self._field, lambda: self._named)

    def _sharded(self, shard: Shard) -> Any:
        saved = hasattr(self.dataset, "to_iterable_dataset")
        parts, what = (len(self.dataset), "documents") if saved else (self.dataset.num_shards, "files")
        if shard.number_of > max(1, parts):
            raise ConfigError(
                f"{self._named} has only {parts} {what}: data.stream_shards = {shard.number_of} must be at most that"
            )
        dataset = self.dataset.to_iterable_dataset(num_shards=shard.number_of) if saved else self.dataset
        return dataset.shard(num_shards=shard.number_of, index=shard.index, contiguous=False)

    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        texts: list[bytes] = []
        text_bytes = rows_before = 0
        for text in self._texts():
            texts.append(text)
            text_bytes += len(text)
            if text_bytes >= unit_bytes:
                yield RowList(self._name, rows_before, tuple(texts), size=len(texts))
                rows_before += len(texts)
                texts, text_bytes = [], 0
        if texts:
            yield RowList(self._name, rows_before, tuple(texts), size=len(texts))

    def _texts(self) -> Iterator[bytes]:
        row = 0
        for batch in self.dataset.iter(ROWS_AT_ONCE):
            if self._field not in batch:
                raise missing_field(self._named, self._field, batch)
            for text in batch[self._field]:
                yield bytes_of_text(text, self._field, partial(row_place, self._name, row))
                row += 1


def load_dataset(name: str, options: InputOptions) -> Any:
    """By its name, or the folder that `save_to_disk` made. Raises ConfigError."""
    import datasets

    split, streaming = options.split or "train", options.streaming

    if Path(name).is_dir():
        try:
            loaded = datasets.load_from_disk(name)
        except Exception as error:  # a damaged one raises whatever its parts do
            raise ConfigError(f"{options.named(name)} is no whole dataset: {_first_line(error)}") from None
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ConfigError(
                    f"{options.named(name)} has no split {split!r}, it has {', '.join(loaded)}: choose with "
                    f"{options.option('split')}"
                )
            loaded = loaded[split]
        return loaded
    try:
        return datasets.load_dataset(name, options.subset, split=split, streaming=streaming)
    except Exception as error:  # whatever the dataset's own code and the network raise
        raise ConfigError(
            f"{options.named(name)} is no file or folder here, and the datasets library cannot load it: "
            f"{_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
