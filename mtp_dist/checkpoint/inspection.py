"""Reports on a checkpoint, or on a folder of them, for `mtp-dist inspect`."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mtp_dist.checkpoint.find import checkpoint_directory, finished_checkpoints, latest_name
from mtp_dist.checkpoint.format import MODEL, OPTIMIZER, SavedLayout, read_metadata
from mtp_dist.checkpoint.manifest import FileRecord, ProgressCallback, check_fully, check_quickly
from mtp_dist.checkpoint.reader import TensorReader
from mtp_dist.errors import UserError


@dataclass(frozen=True)
class TensorGroup:
    """Weights of one shape whose names differ only in the number of the layer or head."""

    name: str
    """Global name, with `*` for that number."""
    count: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointReport:
    """Everything that `mtp-dist inspect` shows of one checkpoint."""

    folder: str
    run: str
    step: int
    optimizer_updates: int
    vocab_size: int
    layout: SavedLayout | None
    losses: Sequence[float | None]
    """Losses of heads 1, 2, ... in that step, in nats."""
    versions: dict[str, str | None]
    parameters: dict[str, int]
    """Number of parameters by part of the model."""
    weights: list[TensorGroup]
    bytes: dict[str, int]
    """Size on disk by kind of file."""
    files: int


def inspect_checkpoint(folder: Path, on_progress: ProgressCallback) -> CheckpointReport:
    """Read and verify all of a checkpoint and return the report. Raise CheckpointError if it is not valid."""
    records = check_fully(folder, on_progress)
    metadata = read_metadata(folder)
    shapes = TensorReader(folder, MODEL).shapes()
    parameters: Counter[str] = Counter()
    for name, shape in shapes.items():
        parameters[report_group(name)] += prod(shape)
    groups = Counter((re.sub(r"\.\d+\.", ".*.", name, count=1), shape) for name, shape in shapes.items())
    return CheckpointReport(
        folder=str(folder),
        run=metadata.config.run.name,
        step=metadata.step,
        optimizer_updates=metadata.optimizer_updates,
        vocab_size=metadata.config.vocab_size,
        layout=metadata.layout,
        losses=metadata.losses,
        versions=metadata.versions,
        parameters=dict(parameters),
        weights=[TensorGroup(name, count, shape) for (name, shape), count in groups.items()],
        bytes=_bytes_by_kind(records),
        files=len(records),
    )


def report_group(name: str) -> str:
    """Return the part of the model that a weight belongs to."""
    first, second, *_ = name.split(".")
    if first == "heads":
        return "all heads, repeated" if second == "repeated" else f"head {second}"
    return first if first in ("trunk", "final_norm", "weighted_hidden_states") else "embeddings"


def _bytes_by_kind(records: dict[str, FileRecord]) -> dict[str, int]:
    sizes = dict.fromkeys(("weights", "optimizer", "descriptions"), 0)
    for name, record in records.items():
        kind = "descriptions" if name.endswith(".json") else "optimizer" if name.startswith(OPTIMIZER) else "weights"
        sizes[kind] += record.bytes
    return sizes


@dataclass(frozen=True)
class CheckpointLine:
    """One of the checkpoints in a folder. Its tensors have not been read."""

    folder: str
    step: int
    latest: bool
    """True if `latest` names it."""
    bytes: int | None = None
    layout: SavedLayout | None = None
    losses: Sequence[float | None] = ()
    damage: str | None = None
    """The problem found in names, sizes or JSON files."""


def list_checkpoints(directory: Path) -> list[CheckpointLine]:
    """Return the checkpoints in a folder or in a run's folder, the highest step first."""
    directory = checkpoint_directory(directory)
    latest = latest_name(directory)
    lines = []
    for step, folder in finished_checkpoints(directory).items():
        try:
            size = sum(record.bytes for record in check_quickly(folder).values())
            saved = read_metadata(folder)
            lines.append(CheckpointLine(str(folder), step, folder.name == latest, size, saved.layout, saved.losses))
        except UserError as error:
            lines.append(CheckpointLine(str(folder), step, folder.name == latest, damage=str(error)))
    return lines
