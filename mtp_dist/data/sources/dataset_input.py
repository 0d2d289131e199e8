"""A Hugging Face dataset as an input."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mtp_dist.data.sources.input import UNSPLIT, FileCounts, Input, InputOptions, Shard, sha256_of_json
from mtp_dist.data.sources.work_units import WorkUnit, missing_field_error, row_lists, row_location
from mtp_dist.errors import ConfigError, DataError

ROWS_AT_ONCE = 256


class DatasetInput(Input):
    """A Hugging Face dataset, named by its hub name or the folder it was saved to."""

    def __init__(self, name: str, options: InputOptions) -> None:
        """Load the dataset. Raise UserError if that fails."""
        self._name = name
        self._options = options
        self._label = options.label(name)
        self._fields = options.fields
        self._split = options.split or "train"
        self.dataset = load_dataset(name, options)
        self.total = None if options.streaming else len(self.dataset)
        self.files = FileCounts()
        columns = self.dataset.column_names
        if columns is not None and (missing := self._fields.missing(columns)):
            raise missing_field_error(self._label, self._fields, missing, columns)

    def identity(self) -> list[Any]:
        fingerprint = None if self._options.streaming else self.dataset._fingerprint
        return [[self._name, self._options.subset, self._split, fingerprint]]

    def fingerprint(self) -> str:
        return sha256_of_json(self.identity())

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
            if missing := self._fields.missing(row):
                raise missing_field_error(self._label, self._fields, missing, row)
            yield before, self._fields.document([row[name] for name in self._fields.names], lambda: self._label)

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
            if missing := self._fields.missing(batch):
                raise missing_field_error(self._label, self._fields, missing, batch)
            for values in zip(*(batch[name] for name in self._fields.names), strict=True):
                yield self._fields.document(values, partial(row_location, self._name, row))
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
