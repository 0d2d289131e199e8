"""What the checkpoint tests run on every rank."""

from torch import Tensor

from mtp_dist.config import Config
from tests.parity.runs import VOCAB_SIZE

STEP = 3


def train_and_save(config: Config) -> dict[str, Tensor]:
    """One update, then a checkpoint. Returns this stage's whole fp32 weights."""
    from mtp_dist.checkpoint.weights import checkpoint_path, save_weights
    from mtp_dist.loss.weights import head_weights
    from mtp_dist.model.weights import parameter_shapes
    from mtp_dist.parallel.device import select_device
    from mtp_dist.parallel.engine import TrainingEngine
    from mtp_dist.parallel.topology import initialize_topology
    from mtp_dist.parallel.weights import master_weight, whole_tensors
    from mtp_dist.training.optimizer import build_optimizer
    from mtp_dist.training.reference import local_micro_batches, random_batch

    device = select_device(config)
    topology = initialize_topology(config, device)
    engine = TrainingEngine(config, VOCAB_SIZE, topology, lambda weights: build_optimizer(config, weights, device))
    engine.train_step(
        local_micro_batches(config, topology, *random_batch(config, VOCAB_SIZE)), 1e-3, head_weights(config, 1)
    )
    shapes = parameter_shapes(config, VOCAB_SIZE)
    weights = {n: w.clone() for n, w in whole_tensors(engine.stage, shapes, topology, master_weight)}
    # Twice: a second save of the same step replaces the first.
    for _ in range(2):
        save_weights(config, VOCAB_SIZE, engine.stage, topology, STEP)
        assert checkpoint_path(config, STEP).is_dir(), "the checkpoint is there when any rank goes on"
    return weights
