"""What test_document_boundaries.py runs on every rank."""

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.verify.reference_training import END_OF_DOCUMENT, local_batch, random_batch
from tests.engines import open_engine
from tests.tiny import VOCAB_SIZE

END_OF_FIRST = 7
"""Position at which the first of two documents ends."""


def second_document_losses(config: Config) -> tuple[Tensor, Tensor]:
    """Return the heads' mean losses `[n]` at positions of second documents, before and after a change to the first."""
    engine = open_engine(config)
    samples, targets = random_batch(config)
    samples[:, END_OF_FIRST] = END_OF_DOCUMENT
    targets[:, :, : END_OF_FIRST + 1] = IGNORE_INDEX
    changed = samples.clone()
    changed[:, :END_OF_FIRST] = samples[:, :END_OF_FIRST] % (VOCAB_SIZE - 1) + 1
    batches = [local_batch(config, engine.topology, tokens, targets) for tokens in (samples, changed)]
    before, after = (engine.evaluate(batch, head_schedule(config, 1)).losses for batch in batches)
    return torch.tensor(before), torch.tensor(after)
