"""What the checkpoint tests run on every rank."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.verify.reference_training import mean_losses
from tests.engines import open_engine, take_step

LOSSES = (4.5, None, 5.5, 6.5)
"""What every checkpoint is told; the second is not finite."""
RECENT = (4.75, 1 / 3)


@dataclass
class Part:
    """What one rank saw of a training."""

    losses: list[Tensor]
    """Losses of each step, see `mean_losses`."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """This stage's whole fp32 weights after the last update."""
    moments: dict[str, Tensor] = field(default_factory=dict)


def train_part(config: Config, completed_steps: int, last: int, resume: Path | None = None, save: bool = True) -> Part:
    """Updates completed_steps + 1 .. last, from a checkpoint if given; then a checkpoint."""
    from mtp_dist.checkpoint.format import RunState, checkpoint_path
    from mtp_dist.checkpoint.restore import restore
    from mtp_dist.checkpoint.saver import CheckpointSaver
    from mtp_dist.distributed.topology import new_gloo_groups
    from mtp_dist.engine.optimizer_state import MOMENTS, ensure_state, moment
    from mtp_dist.engine.tensor_shards import full_tensors, master_weight
    from mtp_dist.model.parameters import parameter_shapes

    engine = open_engine(config)
    topology = engine.topology
    if resume:
        restore(engine, resume)
    steps = range(completed_steps + 1, last + 1)
    part = Part([mean_losses(take_step(engine, step).heads, config.heads.count) for step in steps])
    shapes = parameter_shapes(config)
    ensure_state(engine.pipeline)
    part.weights = {n: w.clone() for n, w in full_tensors(engine.stage, shapes, topology, master_weight)}
    for key in MOMENTS:
        of_stage = full_tensors(
            engine.stage, shapes, topology, lambda weight, key=key: moment(engine.pipeline, key, weight)
        )
        part.moments |= {f"{key}.{name}": tensor.clone() for name, tensor in of_stage}
    if save:
        # Twice: a second save of the same step replaces the first.
        saver = CheckpointSaver(config, engine, new_gloo_groups(topology), print)
        for _ in range(2):
            saver.save(RunState(last, [float("nan") if loss is None else loss for loss in LOSSES], RECENT))
            saver.wait()
            assert checkpoint_path(config, last).is_dir(), "the checkpoint is there when any rank goes on"
    return part
