"""Opening a checkpoint at any layout, to train on or to use the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import sleep

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtp_dist.checkpoint.find import ResumePoint, find_resume_point, older_resume_point
from mtp_dist.checkpoint.format import MODEL, OPTIMIZER, read_metadata
from mtp_dist.checkpoint.manifest import DamagedCheckpointError, check_content, read_manifest, tensor_files
from mtp_dist.checkpoint.reader import TensorReader
from mtp_dist.config import Config
from mtp_dist.distributed.collectives import from_rank_0
from mtp_dist.distributed.topology import Topology, all_gather_objects, dp_group
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
from mtp_dist.errors import ConfigError
from mtp_dist.model.parameters import named_weights, parameter_shapes
from mtp_dist.model.sharding import blocks_of_part

LOOKS, SECONDS_BETWEEN_LOOKS = 60, 1.0
"""How often a rank looks for the folder that rank 0 names: as long as NFS may remember that it was not there."""


@torch.no_grad()
def restore(engine: TrainingEngine, folder: Path) -> None:
    """Give this rank its part of a checkpoint's weights and moments. A collective over the data-parallel groups.

    A weight that the checkpoint lacks, such as a new head's, gets its initial value. Moments that its index does not
    list, as in an imported checkpoint, start from 0. Raise ConfigError if the checkpoint is damaged.
    """
    completed_steps = read_metadata(folder).optimizer_updates
    model, optimizer = TensorReader(folder, MODEL), TensorReader(folder, OPTIMIZER) if completed_steps else None
    topology, shapes = engine.topology, parameter_shapes(engine.config)
    ensure_state(engine.pipeline)
    weights = list(named_weights(engine.stage))
    for (name, weight), rows in zip(
        weights, _rows_by_reader([weight for _, weight in weights], topology.dp_size), strict=True
    ):
        part = _Part(weight, shapes[name], topology, rows)
        is_saved = name in model.weight_map
        values = part.read_together(model, name) if is_saved else engine.initial_values(name, weight, shapes[name])
        set_master_weight(weight, values)
        for key in MOMENTS:
            if optimizer is None or (moment := f"{key}.{name}") not in optimizer.weight_map:
                values = torch.zeros(weight.shape, device=weight.device)
            elif kept := owned_rows(weight):
                values = part.read_alone(optimizer, moment, *kept)
            else:
                values = part.read_together(optimizer, moment)
            set_moment(engine.pipeline, key, weight, values)
    set_updates(engine.pipeline, completed_steps)
    check_updates(engine.pipeline, completed_steps)
    engine.optimizer_updates = completed_steps


def _rows_by_reader(weights: Sequence[nn.Parameter], readers: int) -> list[list[int]]:
    """Return for each weight the row from which each of the readers reads, and the number of rows.

    The weights one after the other are cut into runs of the same size: a run lies in few files.
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
class _Part:
    """What this rank holds of a tensor, and which rank of its data-parallel group reads which rows of it."""

    weight: nn.Parameter
    shape: tuple[int, ...]
    """Of the whole tensor."""
    topology: Topology
    rows: Sequence[int]
    """See `_rows_by_reader`."""

    def read_together(self, reader: TensorReader, name: str) -> Tensor:
        """Return all of the part. Each of its rows is read by one rank, which sends it to the others."""
        values = torch.empty(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        for source, (first, last) in enumerate(pairwise(self.rows)):
            if source == self.topology.dp_rank:
                values[first:last] = self._read(reader, name, first, last)
            if self.topology.dp_size > 1 and first < last:
                dist.broadcast(values[first:last], group=dp_group(), group_src=source)
        return values

    def read_alone(self, reader: TensorReader, name: str, first: int, last: int) -> Tensor:
        """Return the part with these rows; the others are 0."""
        values = torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        values[first:last] = self._read(reader, name, first, last)
        return values

    def _read(self, reader: TensorReader, name: str, first: int, last: int) -> Tensor:
        values = torch.zeros(last - first, *self.weight.shape[1:])
        done = 0
        for block in blocks_of_part(self.shape, self.weight, self.topology.tp_rank, self.topology.tp_size, first, last):
            read = reader.read_block(name, block)
            values[done : done + len(read)] = read
            done += len(read)
        return values


def agree_on_resume_point(config: Config, topology: Topology, gloo_group: dist.ProcessGroup) -> ResumePoint | None:
    """Return the newest checkpoint that `checkpoint.resume` asks for, the same on every rank; None for a new run.

    Rank 0 looks for it and tells the others; its tensors are what was written, each rank reads its share of them.
    A collective over `gloo_group`, all ranks. Raise ConfigError, on every rank, if `find_resume_point` does or if a
    rank does not see the checkpoint.
    """
    point = from_rank_0(lambda: find_resume_point(config), gloo_group)
    while point:
        _await_folder(point.folder, gloo_group)
        found = all_gather_objects(_damage_in_share(point.folder, topology), gloo_group)
        damage = next(filter(None, found), None)
        if damage is None:
            return point
        point = from_rank_0(partial(older_resume_point, point, damage, config), gloo_group)
    return None


def _await_folder(folder: Path, gloo_group: dist.ProcessGroup) -> None:
    """Wait until every rank sees the folder: over NFS some may see it later than the one that made it."""
    for _ in range(LOOKS):
        seen = all_gather_objects(folder.is_dir(), gloo_group)
        if all(seen):
            return
        sleep(SECONDS_BETWEEN_LOOKS)
    raise ConfigError(
        f"rank 0 would start from {folder}, which rank {seen.index(False)} does not see: checkpoint.directory must be "
        "the same folder on all ranks"
    )


def _damage_in_share(folder: Path, topology: Topology) -> str | None:
    """What is wrong with the tensor files that this rank answers for."""
    try:
        records = read_manifest(folder)
        for name in tensor_files(records)[topology.rank :: topology.world_size]:
            check_content(folder, name, records[name])
    except DamagedCheckpointError as error:
        return str(error)
    return None
