"""What test_document_boundaries.py runs on every rank."""

from torch import Tensor

from mtp_dist.config import Config
from tests.tiny import VOCAB_SIZE

END_OF_FIRST = 7
"""Position at which the first of two documents ends."""


def losses_of_second_documents(config: Config) -> tuple[Tensor, Tensor]:
    """Sums `[n]` of the heads' losses at positions of second documents, before and after a change to the first ones."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.engine.engine import TrainingEngine
    from mtp_dist.engine.optimizer import build_optimizer
    from mtp_dist.model.targets import IGNORE_INDEX
    from mtp_dist.verify.reference_training import END_OF_DOCUMENT, local_micro_batches, random_batch

    device = select_device(config)
    topology = initialize_topology(config, device)
    engine = TrainingEngine(config, VOCAB_SIZE, topology, lambda weights: build_optimizer(config, weights, device))
    samples, targets = random_batch(config, VOCAB_SIZE)
    samples[:, END_OF_FIRST] = END_OF_DOCUMENT
    targets[:, :, : END_OF_FIRST + 1] = IGNORE_INDEX
    changed = samples.clone()
    changed[:, :END_OF_FIRST] = samples[:, :END_OF_FIRST] % (VOCAB_SIZE - 1) + 1
    batches = [local_micro_batches(config, topology, tokens, targets) for tokens in (samples, changed)]
    before, after = (engine.evaluate(batch, len(batch))[0] for batch in batches)
    return before, after
