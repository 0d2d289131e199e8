"""The training loop."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.data.loading import Datasets
from mtp_dist.parallel.device import peak_memory
from mtp_dist.parallel.engine import TrainingEngine
from mtp_dist.parallel.topology import largest_over_ranks
from mtp_dist.training.batches import Batches
from mtp_dist.training.callbacks import Callback
from mtp_dist.training.metrics import HeadMetrics, StepMetrics
from mtp_dist.training.optimizer import learning_rate


def fit(
    config: Config,
    engine: TrainingEngine,
    datasets: Datasets,
    callbacks: Sequence[Callback],
    save: Callable[[int], None],
) -> None:
    """Train for `train.steps` updates, validating and saving on the way and at the end.

    save writes the checkpoint of a step; every rank calls it. callbacks are told of steps and validations.
    """
    batches = Batches(config, engine.topology)
    with ExitStack() as ends:
        for callback in callbacks:
            ends.callback(callback.on_end)
            callback.on_start()
        for step in range(1, config.train.steps + 1):
            started = time.perf_counter()
            rate = learning_rate(config, step)
            sums, grad_norm = engine.train_step(batches.training(datasets.train, step), rate)
            metrics = StepMetrics(
                step=step,
                heads=head_metrics(sums, config.heads.weights),
                grad_norm=grad_norm,
                learning_rate=rate,
                tokens=config.train.global_batch_size * config.train.sequence_length,
                seconds=time.perf_counter() - started,
                peak_memory=int(largest_over_ranks(peak_memory(engine.topology.device), engine.topology)),
            )
            for callback in callbacks:
                callback.on_step(metrics)
            if datasets.validation and _is_due(step, config.train.validate_every, config.train.steps):
                micro_batches, number = batches.validation(datasets.validation.samples)
                heads = head_metrics(engine.evaluate(micro_batches, number), config.heads.weights)
                for callback in callbacks:
                    callback.on_validation(step, heads)
            if _is_due(step, config.checkpoint.every, config.train.steps):
                save(step)


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def head_metrics(sums: Tensor, weights: Sequence[float]) -> HeadMetrics:
    """From `[3, n]`: the heads' summed cross-entropies, correct predictions and valid targets."""
    losses, correct, targets = sums
    losses = losses / targets.clamp(min=1)
    return HeadMetrics(
        losses=tuple(losses.tolist()),
        accuracies=tuple((correct / targets.clamp(min=1)).tolist()),
        total=sum(weight * loss for weight, loss in zip(weights, losses.tolist(), strict=True)),
    )
