"""From the names of inputs to their work units, always the same for the same files and options."""

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
from mtp_dist.data.sources.work_units import WholeFiles, WorkUnit, encode_text, missing_field, row_lists, row_location
from mtp_dist.errors import ConfigError, DataError

UNIT_BYTES = 2 << 20
"""Approximate text per work unit: about a second of work, so that processes finish at nearly the same time."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class InputOptions:
    """The parts of an input to read."""

    field: str = "text"
    """Field of each record that holds the text."""
    glob: str | None = None
    """Pattern of the files of a folder."""
    subset: str | None = None
    """Subset of a dataset that has several."""
    split: str | None = None
    """Split of a dataset, by default `train`; `all`, `train` or `validation` of a folder or python-stdlib."""
    streaming: bool = False
    """Read a dataset while it is being downloaded."""
    key: str | None = None
    """Key of the source in the configuration, such as `data.train.0`; None on the command line."""

    def label(self, name: str | Path) -> str:
        """Return how error messages name an input."""
        return f"{self.key}.path = '{name}'" if self.key else f"INPUT '{name}'"

    def option(self, option: str) -> str:
        """Return how error messages name an option."""
        return f"{self.key}.{option}" if self.key else f"--{option}"


@dataclass
class FileCounts:
    """Counts of the files that were read and skipped."""

    read: Counter[str] = field(default_factory=Counter)
    """Number of files by kind."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of files by reason."""
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
        """Return a line about the files that were read and one about those that were skipped, if any."""
        lines = []
        for suffix, counts in (("", self.read), (" skipped", self.skipped)):
            if total := counts.total():
                kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(counts.items()))
                lines.append(f"{total:,} files{suffix}: {kinds}")
        if self.first_skipped:
            lines[-1] += f"; the first: {self.first_skipped}"
        return lines


@dataclass(frozen=True)
class Shard:
    """One of the parts that an input is split into, the same on every machine."""

    index: int
    num_shards: int

    def __str__(self) -> str:
        return f"shard {self.index} of {self.num_shards}"


UNSPLIT = Shard(0, 1)


class Input(ABC):
    """Documents that a user names: files or a dataset."""

    total: int | None
    """Sum of the units' sizes; None if it is unknown before the end."""
    files: FileCounts
    """Counts of the files whose units were read; empty for datasets."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """Return as JSON what must be the same when `prepare` resumes: items that start with a name."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a SHA-256 in hexadecimal that differs for other documents, without reading them."""

    @abstractmethod
    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        """Yield the work units in order. Raise UserError or OSError if the input cannot be read."""

    @abstractmethod
    def documents(self, position: Any, shard: Shard = UNSPLIT) -> Iterator[tuple[Any, bytes]]:
        """Yield a shard's documents from a position on, or all of them for None, each with its position as JSON.

        Raise UserError if the input cannot be read or cannot be split into so many shards.
        """


def open_inputs(names: Sequence[str], options: InputOptions) -> list[Input]:
    """Open inputs. Raise UserError if one is missing or unreadable, or if an option does not fit."""
    if options.glob is not None and not any(Path(name).is_dir() for name in names):
        raise ConfigError(f"{options.option('glob')} {options.glob!r} selects files of a folder: remove it")
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
                f"{options.option('split')} = '{options.split}' selects a part of a dataset or folder, '{name}' is one "
                "file: remove it"
            )
        return FilesInput([path], options.field)
    in_local_folder = path.parent != Path() and path.parent.is_dir()
    if not path.is_dir():
        check_dataset_name("" if in_local_folder else name, options.label(name))
    return DatasetInput(name, options)


def _hashed_split(options: InputOptions) -> Split:
    split = options.split or "all"
    if split not in ("all", "train", "validation"):
        raise ConfigError(f"{options.option('split')} = '{split}' is unknown for files: use 'train' or 'validation'")
    return cast(Split, split)


def _is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` of the datasets library wrote it."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _files_of_folder(folder: Path, options: InputOptions) -> FilesInput:
    """Return the files sorted by POSIX relative path."""
    if options.glob is None:
        raise ConfigError(
            f"{options.label(folder)} is a folder: select its files with {options.option('glob')}, such as '**/*.py'"
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
            f"{options.label(folder)} has no file for {options.option('glob')} {options.glob!r} and "
            f"{options.option('split')} '{split}': choose others"
        )
    return FilesInput(chosen, options.field, skipped)


class FilesInput(Input):
    """Files on disk; a file without records is one document."""

    def __init__(self, files: Sequence[Path], field: str, skipped_entries: Counter[str] | None = None) -> None:
        """Recognize the kind of each file.

        skipped_entries: counts by reason in a folder; None if the user named the file, which must be readable.
        """
        self._field = field
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
        return _sha256([[file.name, stat.st_size, *_kind_beyond_name(file, kind)] for file, stat, kind in self._files])

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
                yield from record_units(file, kind, stat.st_size, self._field, unit_bytes)
        if texts:
            yield WholeFiles(tuple(texts), size=text_size)

    def _recognize(self, file: Path) -> FileKind | UnreadableFileError:
        """Return a file's kind; for a file of a folder, the reason to skip it."""
        try:
            kind = recognize(file, self._field)
            check_columns(file, kind, self._field)
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


class DatasetInput(Input):
    """A Hugging Face dataset, named by its hub name or the folder it was saved to."""

    def __init__(self, name: str, options: InputOptions) -> None:
        """Load the dataset. Raise UserError if that fails."""
        self._name = name
        self._options = options
        self._label = options.label(name)
        self._field = options.field
        self._split = options.split or "train"
        self.dataset = load_dataset(name, options)
        self.total = None if options.streaming else len(self.dataset)
        self.files = FileCounts()
        columns = self.dataset.column_names
        if columns is not None and options.field not in columns:
            raise missing_field(self._label, options.field, columns)

    def identity(self) -> list[Any]:
        fingerprint = None if self._options.streaming else self.dataset._fingerprint
        return [[self._name, self._options.subset, self._split, fingerprint]]

    def fingerprint(self) -> str:
        return _sha256(self.identity())

    def documents(self, position: Any, shard: Shard = UNSPLIT) -> Iterator[tuple[Any, bytes]]:
        """Yield the documents of every num_shards-th row of a saved dataset, or file of a streamed one."""
        dataset = self._sharded(shard)
        if position is not None:
            dataset.load_state_dict(position)
        rows = iter(dataset)
        while True:
            before = dataset.state_dict()
            try:
                row = next(rows, None)
            except Exception as error:  # the dataset's own code, its files and the network raise many kinds
                raise DataError(f"{self._label}: the datasets library cannot read it: {_first_line(error)}") from None
            if row is None:
                return
            if self._field not in row:
                raise missing_field(self._label, self._field, row)
            yield before, encode_text(row[self._field], self._field, lambda: self._label)

    def _sharded(self, shard: Shard) -> Any:
        saved = hasattr(self.dataset, "to_iterable_dataset")
        parts, unit = (len(self.dataset), "documents") if saved else (self.dataset.num_shards, "files")
        if shard.num_shards > max(1, parts):
            raise ConfigError(
                f"{self._label} has only {parts} {unit}: data.stream_shards = {shard.num_shards} must be at most that"
            )
        dataset = self.dataset.to_iterable_dataset(num_shards=shard.num_shards) if saved else self.dataset
        return dataset.shard(num_shards=shard.num_shards, index=shard.index, contiguous=False)

    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        rows = ((text, number) for number, text in enumerate(self._texts(), 1))
        return row_lists(self._name, rows, unit_bytes)

    def _texts(self) -> Iterator[bytes]:
        row = 0
        for batch in self.dataset.iter(ROWS_AT_ONCE):
            if self._field not in batch:
                raise missing_field(self._label, self._field, batch)
            for text in batch[self._field]:
                yield encode_text(text, self._field, partial(row_location, self._name, row))
                row += 1


def load_dataset(name: str, options: InputOptions) -> Any:
    """Load a dataset by its hub name or the folder that `save_to_disk` wrote. Raise UserError if that fails."""
    import datasets

    split = options.split or "train"
    if Path(name).is_dir():
        try:
            loaded = datasets.load_from_disk(name)
        except Exception as error:  # damaged folders raise many kinds
            raise DataError(f"{options.label(name)} is not a valid dataset: {_first_line(error)}") from None
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ConfigError(
                    f"{options.label(name)} has no split {split!r}, it has {', '.join(loaded)}: choose with "
                    f"{options.option('split')}"
                )
            loaded = loaded[split]
        return loaded
    try:
        return datasets.load_dataset(name, options.subset, split=split, streaming=options.streaming)
    except Exception as error:  # the dataset's own code and the network raise many kinds
        raise DataError(
            f"{options.label(name)} is not a file or folder, and the datasets library cannot load it: "
            f"{_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
