"""The engine of a tiny model on the ranks of a test, and random batches for it."""

from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import initialize_topology
from mtp_dist.engine.engine import StepResult, TrainingEngine, build_engine
from mtp_dist.engine.optimizer import learning_rate
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.model.targets import TrainBatch
from mtp_dist.verify.reference_training import local_batch, random_batch


def open_engine(config: Config, initialize: bool = True) -> TrainingEngine:
    """Open the topology and build the engine of this rank."""
    topology = initialize_topology(config, select_device(config))
    return build_engine(config, topology, initialize)


def global_batch(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """Return samples and unevenly masked targets of a step, counted from 1; the same at every layout."""
    seeded = config.model_copy(update={"run": config.run.model_copy(update={"seed": step - 1})})
    return random_batch(seeded)


def step_batch(engine: TrainingEngine, step: int = 1) -> TrainBatch:
    """Return this rank's part of a step's global batch."""
    return local_batch(engine.config, engine.topology, *global_batch(engine.config, step))


def take_step(engine: TrainingEngine, step: int = 1, rate: float | None = None) -> StepResult:
    """Train on the batch of a step, at its learning rate unless one is given."""
    config = engine.config
    rate = learning_rate(config, step) if rate is None else rate
    return engine.train_step(step_batch(engine, step), step, rate, head_schedule(config, step))
