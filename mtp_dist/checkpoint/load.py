"""Opening a checkpoint at any layout, to train on or to use the model."""

from pathlib import Path

import torch
from torch import Tensor

from mtp_dist.checkpoint.files import MODEL, OPTIMIZER, TensorReader, read_description
from mtp_dist.config import Config, ConfigError
from mtp_dist.model.weights import cut, named_weights
from mtp_dist.parallel.engine import TrainingEngine
from mtp_dist.parallel.optimizer_state import MOMENTS, ensure_state, set_master_weight, set_moment, set_updates
from mtp_dist.parallel.topology import Topology, largest_over_ranks


def load_weights(folder: Path) -> tuple[Config, int, dict[str, Tensor]]:
    """Configuration, vocabulary size and whole fp32 weights by global name. Raises ConfigError where there are none."""
    description, reader = read_description(folder), TensorReader(folder, MODEL)
    return description.config, description.vocab_size, {name: reader.read(name) for name in reader.homes}


@torch.no_grad()
def restore(engine: TrainingEngine, folder: Path) -> None:
    """Give this rank its part of a checkpoint's weights and moments.

    A weight that the checkpoint lacks, such as a new head's, keeps its initial value. Before the first update, as in an
    imported checkpoint, there are no moments: they start from 0. Raises ConfigError where the checkpoint is damaged.
    """
    updates_made = read_description(folder).optimizer_updates
    model, optimizer = TensorReader(folder, MODEL), TensorReader(folder, OPTIMIZER) if updates_made else None
    topology = engine.topology
    ensure_state(engine.pipeline)
    for name, weight in named_weights(engine.stage):
        if name not in model.homes:
            continue

        def part(whole: Tensor, weight: torch.nn.Parameter = weight) -> Tensor:
            return cut(whole, weight, topology.tensor_rank, topology.tensor).to(weight.device)

        set_master_weight(weight, part(model.read(name)))
        for key in MOMENTS:
            if optimizer:
                set_moment(engine.pipeline, key, weight, part(optimizer.read(f"{key}.{name}")))
    set_updates(engine.pipeline, updates_made)


def check_ranks_agree(updates_made: int, topology: Topology) -> None:
    """Raises ConfigError where ranks would go on after different steps, as where each sees another disk."""
    if largest_over_ranks(updates_made, topology) != -largest_over_ranks(-updates_made, topology):
        raise ConfigError(
            f"rank {topology.rank} would go on after step {updates_made}, another rank after another one: "
            "checkpoint.directory must be the same folder on all of them"
        )
