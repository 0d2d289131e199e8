"""What the tests of this folder run on every rank."""

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.engine.tensor_shards import full_tensors, master_weight
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.metrics import HeadMetrics
from mtp_dist.model.parameters import named_weights, parameter_shapes
from mtp_dist.model.targets import IGNORE_INDEX
from mtp_dist.verify.reference_training import local_batch, random_batch
from tests.engines import open_engine

SILENT_HEAD = 2
"""Prediction distance of the head that has no valid target."""


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Of this rank's stage, as the optimizer has them; the model's own must be the same in its precision."""
    engine = open_engine(config)
    for name, weight in named_weights(engine.stage):  # the copy of a tied weight too
        assert torch.equal(weight, master_weight(weight).to(weight.dtype)), name
    return dict(full_tensors(engine.stage, parameter_shapes(config), engine.topology, master_weight))


def train_with_a_silent_head(config: Config) -> tuple[list[HeadMetrics], list[float], dict[str, Tensor]]:
    """Return metrics of three steps and an evaluation, the steps' gradient norms and this stage's weights."""
    engine, schedule = open_engine(config), head_schedule(config, 1)
    tokens, targets = random_batch(config)
    targets[SILENT_HEAD - 1] = IGNORE_INDEX
    # One micro-batch of head 1 is empty too, although the head is not.
    targets[0, : config.train.micro_batch_size] = IGNORE_INDEX
    batch = local_batch(config, engine.topology, tokens, targets)
    results = [engine.train_step(batch, 1e-3, schedule) for _ in range(3)]
    assert torch.as_tensor(engine.pipeline.agg_train_loss).isfinite(), "the loss that DeepSpeed sees"
    metrics = [*(result.heads for result in results), engine.evaluate(batch, schedule)]
    shapes = parameter_shapes(config)
    weights = {n: w.clone() for n, w in full_tensors(engine.stage, shapes, engine.topology, master_weight)}
    return metrics, [result.grad_norm for result in results], weights
