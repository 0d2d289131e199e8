"""Opening a checkpoint at any layout, to train on or to use the model."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_dist.checkpoint.files import MODEL, OPTIMIZER, read_description
from mtp_dist.checkpoint.manifest import DamagedError, Watch, check_content, check_weights, read_manifest, tensor_files
from mtp_dist.checkpoint.reader import TensorReader
from mtp_dist.checkpoint.resume import ResumePoint, older_resume_point
from mtp_dist.config import Config, ConfigError
from mtp_dist.model.weights import cut, initial_weight, named_weights, parameter_shapes
from mtp_dist.parallel.engine import TrainingEngine
from mtp_dist.parallel.optimizer_state import (
    MOMENTS,
    check_updates,
    ensure_state,
    set_master_weight,
    set_moment,
    set_updates,
)
from mtp_dist.parallel.topology import Topology, gather_over_ranks


def load_weights(folder: Path, watch: Watch = lambda done, total: None) -> tuple[Config, int, dict[str, Tensor]]:
    """Return the configuration, the vocabulary size and the whole fp32 weights by global name.

    Raise ConfigError if there are none, or others than were saved. `watch` follows the verification of their files.
    """
    check_weights(folder, watch)
    description, reader = read_description(folder), TensorReader(folder, MODEL)
    return description.config, description.vocab_size, {name: reader.read(name) for name in reader.homes}


@torch.no_grad()
def restore(engine: TrainingEngine, folder: Path) -> None:
    """Give this rank its part of a checkpoint's weights and moments.

    A weight that the checkpoint lacks, such as a new head's, gets its initial value. Before the first update, as in an
    imported checkpoint, there are no moments: they start from 0. Raises ConfigError where the checkpoint is damaged.
    """
    updates_made = read_description(folder).optimizer_updates
    model, optimizer = TensorReader(folder, MODEL), TensorReader(folder, OPTIMIZER) if updates_made else None
    topology, shapes = engine.topology, parameter_shapes(engine.config, engine.vocab_size)
    ensure_state(engine.pipeline)
    for name, weight in named_weights(engine.stage):
        is_saved = name in model.homes

        def part(whole: Tensor, weight: torch.nn.Parameter = weight) -> Tensor:
            return cut(whole, weight, topology.tensor_rank, topology.tensor).to(weight.device)

        set_master_weight(
            weight, part(model.read(name) if is_saved else initial_weight(engine.config, name, shapes[name]))
        )
        for key in MOMENTS:
            moment = optimizer.read(f"{key}.{name}") if optimizer and is_saved else torch.zeros(shapes[name])
            set_moment(engine.pipeline, key, weight, part(moment))
    set_updates(engine.pipeline, updates_made)
    check_updates(engine.pipeline, updates_made)
    engine.optimizer_updates = updates_made


def agree_on_resume_point(
    point: ResumePoint | None, config: Config, vocab_size: int, topology: Topology, cpu_group: dist.ProcessGroup
) -> ResumePoint | None:
    """`point`, or the newest one before it, whose tensors are what was written: each rank reads its share of them.

    The same on every rank. Raises ConfigError where all are damaged, or where the ranks see different checkpoints.
    """
    while True:
        starts = gather_over_ranks(point.folder.name if point else "the beginning", cpu_group)
        if len(set(starts)) > 1:
            raise ConfigError(
                f"rank 0 would start from {starts[0]}, another rank from "
                f"{next(start for start in starts if start != starts[0])}: checkpoint.directory must be the same "
                "folder on all of them"
            )
        if point is None:
            return None
        found = gather_over_ranks(_damage_in_share(point.folder, topology), cpu_group)
        damage = next(filter(None, found), None)
        if damage is None:
            return point
        point = older_resume_point(point, damage, config, vocab_size)


def _damage_in_share(folder: Path, topology: Topology) -> str | None:
    """What is wrong with the tensor files that this rank answers for."""
    try:
        records = read_manifest(folder)
        for name in tensor_files(records)[topology.rank :: topology.world_size]:
            check_content(folder, name, records[name])
    except DamagedError as error:
        return str(error)
    return None
