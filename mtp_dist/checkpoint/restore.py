"""Restoring an engine from a checkpoint, at any layout."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import sleep

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_dist.checkpoint.find import ResumePoint, find_resume_point, older_resume_point
from mtp_dist.checkpoint.format import MODEL, OPTIMIZER, InvalidCheckpointError, read_metadata
from mtp_dist.checkpoint.manifest import check_content, read_manifest, tensor_files
from mtp_dist.checkpoint.reader import TensorReader, WeightReader
from mtp_dist.config import Config
from mtp_dist.distributed.collectives import all_gather_objects, from_rank_0
from mtp_dist.distributed.topology import Topology, dp_group
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.engine.optimizer_state import (
    MOMENTS,
    check_updates,
    ensure_state,
    owned_rows,
    set_master_weight,
    set_moment,
    set_updates,
)
from mtp_dist.errors import CheckpointError, LaunchError
from mtp_dist.model.parameters import named_weights, parameter_shapes
from mtp_dist.model.sharding import shard_blocks

FOLDER_CHECKS, CHECK_INTERVAL_S = 60, 1.0
"""Number of checks and seconds between them, while a rank waits for the folder that rank 0 names: NFS may cache for a
minute that it does not exist."""


@torch.no_grad()
def restore(engine: TrainingEngine, folder: Path) -> None:
    """Load this rank's shards of a checkpoint's weights and moments. A collective over the data-parallel groups.

    A weight that the checkpoint lacks, such as a new head's, gets its initial value. Moments that its index does not
    list, as in an imported checkpoint or of weights that were frozen, start from 0. Raise CheckpointError if the
    checkpoint is corrupt.
    """
    updates = read_metadata(folder).optimizer_updates
    model, optimizer = TensorReader(folder, MODEL), TensorReader(folder, OPTIMIZER) if updates else None
    ensure_state(engine.pipeline)
    for name, weight, shard in _load_weights(engine, model, model.weight_map):
        for key in MOMENTS if weight.requires_grad else ():
            if optimizer is None or (moment := f"{key}.{name}") not in optimizer.weight_map:
                values = torch.zeros(weight.shape, device=weight.device)
            elif kept := owned_rows(weight):
                values = shard.read_rows(optimizer, moment, *kept)
            else:
                values = shard.read_and_broadcast(optimizer, moment)
            set_moment(engine.pipeline, key, weight, values)
    set_updates(engine.pipeline, updates)
    check_updates(engine.pipeline, updates)
    engine.optimizer_updates = updates


@torch.no_grad()
def load_initial_weights(engine: TrainingEngine, reader: WeightReader) -> None:
    """Load this rank's shards of the weights of another model. A collective over the data-parallel groups.

    A weight that the reader lacks gets its initial value. The optimizer stays new. Raise CheckpointError if a file is
    corrupt.
    """
    for _ in _load_weights(engine, reader, reader.shapes()):
        pass


def _load_weights(
    engine: TrainingEngine, reader: WeightReader, saved: Container[str]
) -> Iterator[tuple[str, nn.Parameter, _ShardReader]]:
    """Load each weight of this stage that is `saved`, initialize the others, and yield each after that."""
    shapes, weights = parameter_shapes(engine.config), list(named_weights(engine.stage))
    rows_by_weight = _rows_by_reader([weight for _, weight in weights], engine.topology.dp_size)
    for (name, weight), rows in zip(weights, rows_by_weight, strict=True):
        shard = _ShardReader(weight, shapes[name], engine.topology, rows)
        is_saved = name in saved
        values = (
            shard.read_and_broadcast(reader, name) if is_saved else engine.initial_values(name, weight, shapes[name])
        )
        set_master_weight(weight, values)
        yield name, weight, shard


def _rows_by_reader(weights: Sequence[nn.Parameter], readers: int) -> list[list[int]]:
    """Return `readers` + 1 bounds of rows per weight: reader r reads rows bounds[r] .. bounds[r + 1] - 1.

    Concatenated, the weights are split into ranges of the same size: the tensors of a range lie in few files.
    """
    total, before = sum(weight.numel() for weight in weights), 0
    found = []
    for weight in weights:
        width = weight.numel() // len(weight)
        ends = (round((total * reader / readers - before) / width) for reader in range(readers + 1))
        found.append([min(max(end, 0), len(weight)) for end in ends])
        before += weight.numel()
    return found


@dataclass(frozen=True)
class _ShardReader:
    """This rank's shard of a tensor, and which rank of its data-parallel group reads which rows of it."""

    weight: nn.Parameter
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    topology: Topology
    rows: Sequence[int]
    """See `_rows_by_reader`."""

    def read_and_broadcast(self, reader: WeightReader, name: str) -> Tensor:
        """Return the complete shard. Each of its rows is read by one rank, which broadcasts it to the others."""
        values = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        for source, (first, last) in enumerate(pairwise(self.rows)):
            if source == self.topology.dp_rank:
                values[first:last] = self._read(reader, name, first, last)
            if self.topology.dp_size > 1 and first < last:
                dist.broadcast(values[first:last], group=dp_group(), group_src=source)
        return values

    def read_rows(self, reader: WeightReader, name: str, first: int, last: int) -> Tensor:
        """Return the shard with these rows; all others are 0."""
        values = torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        values[first:last] = self._read(reader, name, first, last)
        return values

    def _read(self, reader: WeightReader, name: str, first: int, last: int) -> Tensor:
        values = torch.zeros(last - first, *self.weight.shape[1:])
        done = 0
        for block in shard_blocks(self.shape, self.weight, self.topology.tp_rank, self.topology.tp_size, first, last):
            read = reader.read_block(name, block)
            values[done : done + len(read)] = read
            done += len(read)
        return values


def agree_on_resume_point(config: Config, topology: Topology, gloo_group: dist.ProcessGroup) -> ResumePoint | None:
    """Return the newest checkpoint that `checkpoint.resume` selects, the same on every rank; None for a new run.

    Rank 0 finds it and broadcasts it; all ranks together verify its tensor files, each rank some of them. A collective
    over `gloo_group`, all ranks. Raise on every rank what `find_resume_point` raises, and LaunchError if a rank
    cannot find the checkpoint.
    """
    point = from_rank_0(lambda: find_resume_point(config), gloo_group)
    while point:
        problem = _find_problem(point.folder, "", topology, gloo_group)
        if problem is None:
            return point
        point = from_rank_0(partial(older_resume_point, point, problem, config), gloo_group)
    return None


def check_weights_on_all_ranks(folder: Path, topology: Topology, gloo_group: dist.ProcessGroup) -> None:
    """Raise CheckpointError on every rank if a file of a checkpoint's weights is corrupt. A collective over all ranks.

    Each rank verifies some of the files.
    """
    if problem := _find_problem(folder, f"{MODEL}-", topology, gloo_group):
        raise CheckpointError(problem)


def _find_problem(folder: Path, prefix: str, topology: Topology, gloo_group: dist.ProcessGroup) -> str | None:
    """Return what is wrong with the tensor files whose names have the prefix, the same on every rank, or None."""
    _wait_for_folder(folder, gloo_group)
    problems = all_gather_objects(_problem_in_own_files(folder, prefix, topology), gloo_group)
    return next(filter(None, problems), None)


def _wait_for_folder(folder: Path, gloo_group: dist.ProcessGroup) -> None:
    """Wait until every rank finds the folder: over NFS it may appear later than on the rank that created it."""
    for _ in range(FOLDER_CHECKS):
        found = all_gather_objects(folder.is_dir(), gloo_group)
        if all(found):
            return
        sleep(CHECK_INTERVAL_S)
    raise LaunchError(
        f"rank 0 would start from {folder}, which rank {found.index(False)} cannot find: checkpoint.directory must "
        "be the same folder on all ranks"
    )


def _problem_in_own_files(folder: Path, prefix: str, topology: Topology) -> str | None:
    """Return what is wrong with the tensor files that this rank verifies, or None."""
    try:
        records = read_manifest(folder)
        names = [name for name in tensor_files(records) if name.startswith(prefix)]
        for name in names[topology.rank :: topology.world_size]:
            check_content(folder, name, records[name])
    except InvalidCheckpointError as error:
        return str(error)
    return None
