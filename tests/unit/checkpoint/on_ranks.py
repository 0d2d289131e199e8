"""A short training with checkpoints, on every rank."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from mtp_dist.checkpoint.format import RunState, checkpoint_path
from mtp_dist.checkpoint.restore import restore
from mtp_dist.checkpoint.saver import CheckpointSaver
from mtp_dist.config import Config
from mtp_dist.distributed.topology import new_gloo_groups
from mtp_dist.engine.optimizer_state import MOMENTS, ensure_state, moment
from mtp_dist.engine.tensor_shards import full_tensors, master_weight
from mtp_dist.model.parameters import parameter_shapes
from mtp_dist.verify.reference_training import mean_losses
from tests.engines import open_engine, take_step

LOSSES = (4.5, None, 5.5, 6.5)
"""Losses that every checkpoint gets; the second is NaN."""
RECENT = (4.75, 1 / 3)


@dataclass
class Part:
    """What one rank saw of a training."""

    losses: list[Tensor]
    """Losses of each step, see `mean_losses`."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """This stage's full fp32 weights after the last step."""
    moments: dict[str, Tensor] = field(default_factory=dict)


def train_part(config: Config, completed_steps: int, last: int, resume: Path | None = None, save: bool = True) -> Part:
    """Train steps completed_steps + 1 .. last, from a checkpoint if given; then save a checkpoint, twice."""
    engine = open_engine(config)
    stage, topology, shapes = engine.stage, engine.topology, parameter_shapes(config)
    if resume:
        restore(engine, resume)
    steps = range(completed_steps + 1, last + 1)
    part = Part([mean_losses(take_step(engine, step).heads, config.heads.count) for step in steps])
    ensure_state(engine.pipeline)
    part.weights = {n: w.clone() for n, w in full_tensors(stage, shapes, topology, master_weight)}
    for key in MOMENTS:
        moments = full_tensors(stage, shapes, topology, partial(moment, engine.pipeline, key))
        part.moments |= {f"{key}.{name}": tensor.clone() for name, tensor in moments}
    if save:
        saver = CheckpointSaver(config, engine, new_gloo_groups(topology))
        for _ in range(2):  # the second save of the same step replaces the first
            saver.save(RunState(last, [float("nan") if loss is None else loss for loss in LOSSES], RECENT))
            saver.wait()
            assert checkpoint_path(config, last).is_dir(), "the checkpoint exists when any rank continues"
    return part


def run_program(config_file: Path, *overrides: str) -> None:
    """Train as the program does."""
    from mtp_dist.pretrain import main

    try:
        main(["--config", str(config_file), *overrides])
    except SystemExit as end:
        assert not end.code
