"""Training that goes back where the loss jumps, and gives up where going on would be no use."""

import logging
from collections import Counter
from pathlib import Path

import torch.distributed as dist

from mtp_dist.checkpoint.find import ResumePoint
from mtp_dist.checkpoint.restore import agree_on_resume_point, restore
from mtp_dist.checkpoint.saver import CheckpointSaver
from mtp_dist.errors import ConfigError
from mtp_dist.monitoring.callback import StopReason
from mtp_dist.training.trainer import FitResult, Trainer

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 3
"""Times that a run goes back to the same checkpoint: more new samples would not help either."""


def fit_and_recover(
    trainer: Trainer,
    saver: CheckpointSaver,
    gloo_group: dist.ProcessGroup,
    begun_from: ResumePoint | None,
    samples_read: int,
) -> FitResult:
    """`trainer.fit` from `begun_from` on, and after each SPIKE from the newest checkpoint, with the samples after it.

    gloo_group: all ranks. No checkpoint is being written when it returns or raises ConfigError,
    which it does on every rank after SKIPS, and where MAX_ROLLBACKS to the same checkpoint have not helped.
    """
    times: Counter[Path] = Counter()
    if begun_from:
        trainer.spikes.restore(begun_from.recent_losses)
    ending = trainer.fit(begun_from.step if begun_from else 0, samples_read)
    while ending.reason is StopReason.SPIKE:
        trainer.watchdog.enter(f"the way back from step {ending.step} to a checkpoint")
        saver.join()
        point = _newest(trainer, saver, gloo_group) or begun_from
        if point:
            times[point.folder] += 1
            if times[point.folder] > MAX_ROLLBACKS:
                raise ConfigError(
                    f"the loss has jumped {MAX_ROLLBACKS + 1} times after {point.folder}, each time with "
                    "other samples: go on from an older checkpoint (checkpoint.resume), or with a lower optimizer.lr"
                )
            restore(trainer.engine, point.folder)
            trainer.spikes.restore(point.recent_losses)
        step = point.step if point else ending.step
        for callback in trainer.callbacks:
            callback.on_rollback(step)
        where = f"Rolled back from step {ending.step} to {point.folder}" if point else "No checkpoint to roll back to"
        logger.info("%s, continuing after step %d with new samples", where, step, extra={"event": "rollback"})
        ending = trainer.fit(step, trainer.datasets.restore(ending.samples, may_change=True))
    saver.join()
    if ending.reason is StopReason.SKIPS:
        raise ConfigError(
            f"train.max_skipped_steps = {trainer.config.train.max_skipped_steps} steps in a row were skipped, the last "
            f"one was step {ending.step}: the log names ranks and weights; resume from an older checkpoint "
            "(checkpoint.resume) or with a lower optimizer.lr"
        )
    return ending


def _newest(trainer: Trainer, saver: CheckpointSaver, gloo_group: dist.ProcessGroup) -> ResumePoint | None:
    """Return this run's newest checkpoint, the same on every rank."""
    config = trainer.config.model_copy(
        update={"checkpoint": trainer.config.checkpoint.model_copy(update={"resume": "auto"})}
    )
    return agree_on_resume_point(config, trainer.engine.topology, gloo_group)
