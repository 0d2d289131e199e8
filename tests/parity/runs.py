"""The same short training, by the sharded model on the ranks of a test and by the plain reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.config import Config
from tests.tiny import VOCAB_SIZE


@dataclass
class Run:
    """What a training of some steps left, in fp64 or fp32."""

    losses: Tensor
    """`[steps, 3, n]`, before each update: see `mean_losses`."""
    norms: Tensor
    """`[steps]`, before clipping."""
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    weights: dict[str, Tensor]
    """After the last step."""


def global_batches(config: Config, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Unevenly masked random batches, of steps 1..steps. The same at every layout."""
    from mtp_dist.verify.reference_training import random_batch

    seeds = (config.model_copy(update={"run": config.run.model_copy(update={"seed": s})}) for s in range(steps))
    return [random_batch(seeded, VOCAB_SIZE) for seeded in seeds]


def reference_run(config: Config, steps: int) -> Run:
    from mtp_dist.engine.optimizer import learning_rate
    from mtp_dist.loss.schedule import head_weights
    from mtp_dist.verify.reference_training import ReferenceTraining

    training = ReferenceTraining(config, VOCAB_SIZE, torch.device("cpu"))
    results = [
        training.step(samples, targets, learning_rate(config, step), head_weights(config, step))
        for step, (samples, targets) in enumerate(global_batches(config, steps), 1)
    ]
    weights = {name: weight.detach() for name, weight in training.model.named_weights().items()}
    losses = torch.stack([losses for losses, _, _ in results])
    return Run(losses, torch.tensor([norm for _, norm, _ in results]), results[0][2], weights)


def sharded_run(config: Config, steps: int) -> Run | None:
    """On each rank of a test: the run, with this stage's gradients and weights; None on ranks that only repeat them."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.engine.engine import TrainingEngine
    from mtp_dist.engine.optimizer import build_optimizer, learning_rate
    from mtp_dist.engine.tensor_shards import capture_first_gradients, full_tensors, master_weight
    from mtp_dist.loss.schedule import head_weights
    from mtp_dist.model.parameters import parameter_shapes
    from mtp_dist.verify.reference_training import local_micro_batches, mean_losses

    device = select_device(config)
    topology = initialize_topology(config, device)
    engine = TrainingEngine(config, VOCAB_SIZE, topology, lambda weights: build_optimizer(config, weights, device))
    shapes = parameter_shapes(config, VOCAB_SIZE)
    losses, norms = [], []
    with capture_first_gradients(engine, shapes) as gradients:
        for step, (samples, targets) in enumerate(global_batches(config, steps), 1):
            batch = local_micro_batches(config, topology, samples, targets)
            sums, norm, *_ = engine.train_step(batch, learning_rate(config, step), head_weights(config, step))
            losses.append(mean_losses(sums))
            norms.append(norm)
    weights = {n: w.clone() for n, w in full_tensors(engine.stage, shapes, topology, master_weight)}
    if topology.tp_rank or topology.dp_rank:
        return None
    return Run(torch.stack(losses), torch.tensor(norms), gradients, weights)


def merge(stages: list[Run | None]) -> Run:
    """One run from those of all stages: losses and norms must agree, each weight must come from one stage."""
    runs = [run for run in stages if run is not None]
    gradients: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for run in runs:
        assert torch.equal(run.losses, runs[0].losses) and torch.equal(run.norms, runs[0].norms)
        assert not gradients.keys() & run.gradients.keys() and not weights.keys() & run.weights.keys()
        gradients |= run.gradients
        weights |= run.weights
    return Run(runs[0].losses, runs[0].norms, gradients, weights)


def run_with_broken_gradient(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """This rank's weights before and after a step in which one element of rank 0's gradient is NaN, and its norm."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.engine.engine import TrainingEngine
    from mtp_dist.engine.gradients import before_update
    from mtp_dist.engine.optimizer import build_optimizer
    from mtp_dist.loss.schedule import head_weights
    from mtp_dist.model.parameters import named_weights
    from mtp_dist.verify.reference_training import local_micro_batches

    device = select_device(config)
    topology = initialize_topology(config, device)
    engine = TrainingEngine(config, VOCAB_SIZE, topology, lambda weights: build_optimizer(config, weights, device))
    weights = dict(named_weights(engine.stage))
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    def break_gradient() -> None:
        if topology.rank == 0:
            weights["embedding.weight"].grad[0, 0] = float("nan")

    with before_update(engine.pipeline, break_gradient):
        batch = local_micro_batches(config, topology, *global_batches(config, 1)[0])
        _, norm, *_ = engine.train_step(batch, 1e-3, head_weights(config, 1))
    return before, {name: weight.detach().clone() for name, weight in weights.items()}, norm


def losses_of_evaluations(config: Config) -> list[Tensor]:
    """Losses of one batch by an evaluation, by the first training step, and by evaluations after it of the batch once
    and twice over; each `[3, n]`, see `mean_losses`."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.engine.engine import TrainingEngine
    from mtp_dist.engine.optimizer import build_optimizer
    from mtp_dist.loss.schedule import head_weights
    from mtp_dist.verify.reference_training import local_micro_batches, mean_losses

    device = select_device(config)
    topology = initialize_topology(config, device)
    engine = TrainingEngine(config, VOCAB_SIZE, topology, lambda weights: build_optimizer(config, weights, device))
    batch = local_micro_batches(config, topology, *global_batches(config, 1)[0])
    sums = [
        engine.evaluate(batch, len(batch)),
        engine.train_step(batch, 1e-3, head_weights(config, 1))[0],
        engine.evaluate(batch, len(batch)),
        engine.evaluate(batch * 2, 2 * len(batch)),
        engine.train_step(batch, 1e-3, head_weights(config, 1))[0],
    ]
    return [mean_losses(of_batch) for of_batch in sums]
