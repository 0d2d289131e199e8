"""A corpus that grows work unit by work unit and survives a kill at any time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.prepare.tokenize import EncodedUnit, UnitSummary
from mtp_dist.fs import add_suffix, atomic_write_text, sync

TOKENS, LENGTHS, JOURNAL = "tokens.bin", "lengths.bin", "units.jsonl"
INDEX, METADATA_FILE = "index.idx", "description.json"
LENGTH = np.dtype(np.int32)
"""Type of a document's length in tokens."""


class UnfinishedCorpus:
    """A folder with the tokens of all units so far, the lengths of their documents, and a journal with a line per unit.

    A line has the unit's summary and the SHA-256 of all tokens and all lengths up to its end. Nothing is synced before
    the corpus is complete, so a power failure may lose some of it: data that does not match the journal is cut off when
    the folder is opened again.
    """

    def __init__(self, folder: Path, prefix: Path, dtype: type[np.generic]) -> None:
        """Open or create the folder of the corpus `prefix`. Raise OSError."""
        self.folder = folder
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._token_digest, self._length_digest = hashlib.sha256(), hashlib.sha256()
        tokens_file = folder / TOKENS
        if not tokens_file.exists() and self._target(".bin").exists():
            self._target(".bin").rename(tokens_file)  # killed between the renames of a complete corpus
        self._tokens, self._lengths, self._journal = map(_open, (tokens_file, folder / LENGTHS, folder / JOURNAL))
        self.recovered: list[UnitSummary] = []
        """Units that were complete when the folder was opened."""
        self.total = UnitSummary()
        """Sum of the counts of all units. It names no documents."""
        self._recover()

    def close(self) -> None:
        for file in (self._tokens, self._lengths, self._journal):
            file.close()

    def _recover(self) -> None:
        """Keep the complete units and cut the files off after them."""
        end = 0
        for line in self._journal.readlines():
            try:
                entry = json.loads(line)
                summary = UnitSummary(**entry["summary"])
            except (ValueError, KeyError, TypeError):
                break
            digests = self._token_digest.copy(), self._length_digest.copy()
            digests[0].update(self._tokens.read(summary.tokens * self._dtype.itemsize))
            digests[1].update(self._lengths.read(summary.documents * LENGTH.itemsize))
            if [digest.hexdigest() for digest in digests] != entry.get("sha256"):
                break
            self._token_digest, self._length_digest = digests
            end += len(line)
            self.recovered.append(summary)
            self._count(summary)
        self._journal.truncate(end)
        self._tokens.truncate(self.total.tokens * self._dtype.itemsize)
        self._lengths.truncate(self.total.documents * LENGTH.itemsize)

    def _count(self, summary: UnitSummary) -> None:
        for item in fields(summary):
            if not item.name.startswith("first_"):
                setattr(self.total, item.name, getattr(self.total, item.name) + getattr(summary, item.name))

    def add(self, unit: EncodedUnit) -> None:
        """Append the next unit. Raise OSError."""
        for tokens in unit.tokens:
            assert tokens.dtype == self._dtype
            self._token_digest.update(tokens.data)
            _write(self._tokens, tokens.view(np.uint8).data)
        self._length_digest.update(unit.lengths.data)
        _write(self._lengths, unit.lengths.view(np.uint8).data)
        entry = {"summary": asdict(unit.summary), "sha256": [self.sha256, self._length_digest.hexdigest()]}
        _write(self._journal, f"{json.dumps(entry)}\n".encode())
        self._count(unit.summary)

    @property
    def sha256(self) -> str:
        """SHA-256 of all tokens in hexadecimal."""
        return self._token_digest.hexdigest()

    def finish(self, description: str) -> None:
        """Move the corpus to its final names, PREFIX.json with the text `description` last. Raise OSError."""
        from mtp_dist.data.prepare.index_writer import write_index

        lengths: NDArray[np.int32] = np.fromfile(self.folder / LENGTHS, LENGTH)
        assert lengths.sum(dtype=np.int64) == self.total.tokens, "all units are complete"
        write_index(self.folder / INDEX, lengths, self._dtype.type)
        atomic_write_text(self.folder / METADATA_FILE, description)
        for file in (TOKENS, INDEX):
            sync(self.folder / file)
        for file in (INDEX, TOKENS):
            (self.folder / file).rename(self._target(Path(file).suffix))
        sync(self._prefix.absolute().parent)
        (self.folder / METADATA_FILE).rename(self._target(".json"))
        sync(self._prefix.absolute().parent)

    def _target(self, suffix: str) -> Path:
        return add_suffix(self._prefix, suffix)


def _open(file: Path) -> BinaryIO:
    """Open a file to read from its start and append to its end."""
    stream = file.open("a+b", buffering=0)
    stream.seek(0)
    return stream


def _write(stream: BinaryIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]
