"""The same short training, by the sharded model on the ranks of a test and by the plain reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.engine.optimizer import learning_rate
from mtp_dist.engine.tensor_shards import capture_first_gradients, full_tensors, master_weight
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.model.parameters import parameter_shapes
from mtp_dist.model.targets import TrainBatch
from mtp_dist.verify.reference_training import ReferenceTraining, mean_losses, set_nonzero_weights
from tests.engines import global_batch, open_engine, step_batch, take_step


@dataclass
class Run:
    """What a training of some steps left, in fp64 or fp32."""

    losses: Tensor
    """`[steps, 4, n]`, before each update: see `mean_losses`."""
    norms: Tensor
    """`[steps]`, before clipping."""
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    weights: dict[str, Tensor]
    """After the last step."""


def reference_run(config: Config, steps: int) -> Run:
    """Train the reference."""
    training = ReferenceTraining(config, torch.device("cpu"))
    results = [
        training.step(*global_batch(config, step), step, learning_rate(config, step), head_schedule(config, step))
        for step in range(1, steps + 1)
    ]
    weights = {name: weight.detach() for name, weight in training.model.named_weights().items()}
    losses = torch.stack([losses for losses, _, _ in results])
    return Run(losses, torch.tensor([norm for _, norm, _ in results]), results[0][2], weights)


def sharded_run(config: Config, steps: int) -> Run | None:
    """Return the run with this stage's gradients and weights; None on ranks that only repeat them."""
    engine, shapes = open_engine(config), parameter_shapes(config)
    topology = engine.topology
    set_nonzero_weights(engine)
    with capture_first_gradients(engine, shapes) as gradients:
        results = [take_step(engine, step) for step in range(1, steps + 1)]
    weights = {n: w.clone() for n, w in full_tensors(engine.stage, shapes, topology, master_weight)}
    if topology.tp_rank or topology.dp_rank:
        return None
    losses = torch.stack([mean_losses(result.heads, config.heads.count) for result in results])
    return Run(losses, torch.tensor([result.grad_norm for result in results]), gradients, weights)


def merge(stages: list[Run | None]) -> Run:
    """Merge the runs of all stages: losses and norms must agree, each weight must come from one stage."""
    first, *others = [run for run in stages if run is not None]
    merged = Run(first.losses, first.norms, {**first.gradients}, {**first.weights})
    for run in others:
        assert torch.equal(run.losses, first.losses) and torch.equal(run.norms, first.norms)
        assert not merged.gradients.keys() & run.gradients.keys() and not merged.weights.keys() & run.weights.keys()
        merged.gradients |= run.gradients
        merged.weights |= run.weights
    return merged


def losses_of_evaluations(config: Config) -> list[Tensor]:
    """Return the losses of one batch by an evaluation, by the first training step, and by evaluations after it of the
    batch once and twice over; each `[4, n]`, see `mean_losses`."""
    engine, schedule = open_engine(config), head_schedule(config, 1)
    batch = step_batch(engine)
    twice = TrainBatch([*batch.micro_batches] * 2, 2 * batch.num_micro_batches, 2 * batch.valid_targets)
    metrics = [engine.evaluate(batch, schedule), take_step(engine, rate=1e-3).heads]
    metrics += [engine.evaluate(batch, schedule), engine.evaluate(twice, schedule), take_step(engine, rate=1e-3).heads]
    return [mean_losses(heads, config.heads.count) for heads in metrics]
