"""Interface of inputs: documents and work units that a user names, the same for the same files and options."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_dist.config.synthetic import SyntheticConfig
from mtp_dist.data.sources.conversations import ChatTemplate
from mtp_dist.data.sources.fields import Fields
from mtp_dist.data.sources.work_units import WorkUnit

UNIT_BYTES = 2 << 20
"""Approximate text per work unit: about a second of work, so that processes finish at nearly the same time.

Positions of streams in checkpoints count these units.
"""


@dataclass(frozen=True)
class InputOptions:
    """The parts of an input to read."""

    field: str = "text"
    """Field of each record that holds the text, the completion if there is a prompt, or the messages if there is a chat
    template."""
    glob: str | None = None
    """Pattern of the files of a folder."""
    subset: str | None = None
    """Subset of a dataset that has several."""
    split: str | None = None
    """Split of a dataset, by default `train`; `all`, `train` or `validation` of a folder or python-stdlib;
    `train`, the default, or `validation` of a synthetic task."""
    streaming: bool = False
    """Read a dataset while it is being downloaded."""
    key: str | None = None
    """Key of the source in the configuration, such as `data.train.0`; None on the command line."""
    prompt_field: str | None = None
    """Field of each record that holds the prompt."""
    chat_template: ChatTemplate | None = None
    """What writes the messages of a record as text."""
    synthetic: SyntheticConfig | None = None
    """Parameters of a synthetic task."""

    @property
    def fields(self) -> Fields:
        return Fields(self.field, self.prompt_field, self.chat_template)

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
    """Documents that a user names: files or a dataset. `open_inputs` chooses the class."""

    total: int | None
    """Sum of the units' sizes; None if it is unknown before the end."""
    files: FileCounts
    """Counts of the files whose units were read; empty for datasets."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """Return as JSON what must be the same when `prepare` continues: items that start with a name."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a SHA-256 in hexadecimal that differs for other documents, without reading them.

        It is the same on every machine: a streaming run that resumes recognizes the source by it.
        """

    @abstractmethod
    def units(self, unit_bytes: int) -> Iterator[WorkUnit]:
        """Yield the work units in order, for `prepare` and for runs that read the input into memory.

        Raise UserError or OSError if the input cannot be read.
        """

    @abstractmethod
    def documents(self, position: Any, shard: Shard = UNSPLIT) -> Iterator[tuple[Any, bytes]]:
        """Yield a shard's documents from a position on, or all of them for None, each with its position as JSON.

        Streaming runs read these. Raise UserError if the input cannot be read or cannot be split into that many shards.
        """


def sha256_of_json(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
