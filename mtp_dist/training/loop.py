"""The training loop."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.data.loading import Datasets
from mtp_dist.loss.weights import HeadWeights, head_weights
from mtp_dist.parallel.device import peak_memory
from mtp_dist.parallel.engine import TrainingEngine
from mtp_dist.parallel.topology import largest_over_ranks
from mtp_dist.training.batches import Batches
from mtp_dist.training.callbacks import Callback
from mtp_dist.training.metrics import HeadMetrics, StepMetrics
from mtp_dist.training.optimizer import learning_rate
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.watchdog import Watchdog


def fit(
    config: Config,
    engine: TrainingEngine,
    datasets: Datasets,
    callbacks: Sequence[Callback],
    save: Callable[[int, Sequence[float], Any, bool], None],
    stop_signals: StopSignals,
    updates_made: int = 0,
    samples_read: int = 0,
) -> bool:
    """Train up to `train.steps` updates, validating and saving on the way and at the end.

    updates_made and samples_read are those of the checkpoint that the engine was restored from. save is given the
    step, its losses, the state of the training samples and whether it is the last time, on every rank. callbacks are
    told of steps and validations.
    False where a signal to any rank stopped all of them, after the same step and a save, before the last.
    """
    batches = Batches(config, engine.topology, datasets, updates_made, samples_read)
    with ExitStack() as ends:
        ends.callback(batches.close)
        watchdog = ends.enter_context(Watchdog(config.run.step_timeout, engine.topology.rank))
        for callback in callbacks:
            ends.callback(callback.on_end)
            callback.on_start()
        for step in range(updates_made + 1, config.train.steps + 1):
            watchdog.expect(f"step {step}")
            started = time.perf_counter()
            rate = learning_rate(config, step)
            weights = head_weights(config, step)
            sums, grad_norm = engine.train_step(batches.training(), rate, weights)
            of_this_rank = peak_memory(engine.topology.device), stop_signals.received
            peak, signal = largest_over_ranks(of_this_rank, engine.topology)
            stopping = signal > 0 and step < config.train.steps
            metrics = StepMetrics(
                step=step,
                heads=head_metrics(config, sums, weights),
                grad_norm=grad_norm,
                learning_rate=rate,
                tokens=config.train.global_batch_size * config.train.sequence_length,
                seconds=time.perf_counter() - started,
                epochs=datasets.epochs(batches.samples_read),
                peak_memory=int(peak),
            )
            for callback in callbacks:
                callback.on_step(metrics)
                if stopping:
                    callback.on_stop(step, int(signal))
            if _is_due(step, config.train.validate_every, config.train.steps):
                for validation in datasets.validation:
                    watchdog.expect(f"the validation after step {step}")
                    sums = engine.evaluate(*batches.validation(validation.samples))
                    heads = head_metrics(config, sums, HeadWeights(weights.weights, config.heads.count))
                    for callback in callbacks:
                        callback.on_validation(step, validation.name, heads)
            if _is_due(step, config.checkpoint.every, config.train.steps) or stopping:
                watchdog.expect(f"the save after step {step}, or the one before")
                save(step, metrics.heads.losses, batches.state(), stopping or step == config.train.steps)
            if stopping:
                return False
    return True


def _is_due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def head_metrics(config: Config, sums: Tensor, weights: HeadWeights) -> HeadMetrics:
    """Of the active heads, from the engine's sums `[5, n]`."""
    losses, correct, targets, distillation, token_order = sums[:, : weights.active]
    losses, correct, distillation, token_order = (
        of_heads / targets.clamp(min=1) for of_heads in (losses, correct, distillation, token_order)
    )
    objectives = losses + config.heads.distillation * distillation
    total = sum(w * loss for w, loss in zip(weights.weights, objectives.tolist(), strict=False))
    return HeadMetrics(
        losses=tuple(losses.tolist()),
        accuracies=tuple(correct.tolist()),
        distillation=tuple(distillation.tolist()[1:]) if config.heads.distillation else (),
        token_order=float(token_order[0]) if config.heads.token_order else None,
        total=total + config.heads.token_order * float(token_order[0]),
    )
