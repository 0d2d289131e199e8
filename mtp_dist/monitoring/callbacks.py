"""What the loop reports to while it trains, and how a step becomes the scalars of every log.

`MetricsLogger` turns metrics into named scalars once and hands the same mapping to each writer, so that
`metrics.jsonl`, TensorBoard and the terminal cannot disagree.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mtp_dist.metrics import HeadMetrics, StepMetrics
from mtp_dist.monitoring.callback import Callback, StopReason

logger = logging.getLogger(__name__)

Scalars = Mapping[str, float | None]
"""Values by name; None is the loss or accuracy of a head without a valid target."""


class MetricsWriter:
    """A place for scalars; a subclass overrides what it can show. An OSError that it raises is told, and no more."""

    name = ""
    """What the user calls it."""

    def describe(self, description: Mapping[str, Any]) -> None:
        """Called once, before the first step, with what `run.json` says."""

    def advance(self, step: int) -> None:
        """Called after each step, before `write` where the step is logged."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Keep the scalars of one logged step or of one validation."""

    def note(self, text: str) -> None:
        """Tell the reader of the log something that is no number."""

    def close(self, failed: bool) -> None:
        """Called once, after the last write; failed: the run is not what was asked for."""


@dataclass(frozen=True)
class ThroughputUnits:
    """What turns tokens and nats into the units of the logs."""

    flops_per_token: Sequence[int]
    """Model FLOPs of one trained position, forward and backward, while 1, 2, ... n heads run."""
    peak_flops: float | None
    """FLOP/s of all devices of the run together at best; None where unknown."""
    bytes_per_token: Mapping[str | None, float]
    """Mean length of a token in bytes of text, by validation set."""


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss in units that do not depend on the tokenizer."""
    return nats_per_token / math.log(2) / bytes_per_token


def _head_scalars(heads: HeadMetrics) -> dict[str, float | None]:
    scalars = {f"loss/head_{k}": loss for k, loss in enumerate(heads.losses, 1)}
    scalars["loss/total"] = heads.total
    scalars |= {f"loss/distillation/head_{k}": loss for k, loss in enumerate(heads.distillation, 2)}
    if heads.token_order is not None:
        scalars["loss/token_order"] = heads.token_order
    return scalars | {f"accuracy/head_{k}": accuracy for k, accuracy in enumerate(heads.accuracies, 1)}


@dataclass
class ThroughputWindow:
    """What the steps since the last logged one have in sum."""

    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, metrics: StepMetrics, flops_per_token: int) -> None:
        self.tokens += metrics.tokens
        self.flops += metrics.tokens * flops_per_token
        self.seconds += metrics.seconds


def _stage_scalars(metrics: StepMetrics) -> dict[str, float]:
    """Nothing without a pipeline."""
    by_stage: dict[int, int] = {}
    for figures in metrics.ranks:
        by_stage[figures.stage] = max(figures.peak_memory, by_stage.get(figures.stage, 0))
    if len(by_stage) == 1:
        return {}
    memory = {f"memory/peak_bytes/stage_{stage}": float(of_stage) for stage, of_stage in by_stage.items()}
    busy = fmean(figures.busy_seconds for figures in metrics.ranks)
    longest = max(figures.schedule_seconds for figures in metrics.ranks)
    return memory | {"throughput/pipeline_bubble": 1 - busy / longest}


def step_scalars(metrics: StepMetrics, interval: ThroughputWindow, peak_flops: float | None) -> dict[str, float | None]:
    """The scalars of a logged step: losses in nats, rates per second over all ranks, memory in bytes."""
    flops_per_second = interval.flops / interval.seconds
    longest_wait = max(figures.waiting_seconds for figures in metrics.ranks)
    return _head_scalars(metrics.heads) | {
        "train/grad_norm": metrics.grad_norm,
        **{f"train/grad_norm/{part}": norm for part, norm in metrics.grad_norms_by_module.items()},
        "train/learning_rate": metrics.learning_rate,
        "throughput/tokens_per_second": interval.tokens / interval.seconds,
        "throughput/model_flops_per_second": flops_per_second,
        "throughput/mfu": flops_per_second / peak_flops if peak_flops else 0.0,
        "throughput/data_wait_share": longest_wait / interval.seconds,
        "memory/peak_bytes": float(metrics.peak_memory),
        **_stage_scalars(metrics),
        **{f"data/epochs/{name}": epochs for name, epochs in metrics.epochs.items()},
    }


def validation_prefix(name: str | None) -> str:
    """What the scalars of a validation set begin with; the only set of a run may have no name."""
    return f"validation/{name}" if name else "validation"


def validation_scalars(heads: HeadMetrics, name: str | None, bytes_per_token: float) -> dict[str, float | None]:
    """The scalars of a validation: losses in nats per token, and in bits per byte of text."""
    prefix = validation_prefix(name)
    scalars = {f"{prefix}/{scalar}": value for scalar, value in _head_scalars(heads).items()}
    for k, loss in enumerate(heads.losses, 1):
        scalars[f"{prefix}/bits_per_byte/head_{k}"] = None if loss is None else bits_per_byte(loss, bytes_per_token)
    return scalars


class MetricsLogger(Callback):
    """Writes the steps that are to be logged and each validation to all writers. For rank 0 only.

    Tokens per second are those of all steps since the last logged one, over the wall time since then:
    only validation and checkpoints in between do not count. Training does not depend on a writer.
    """

    def __init__(self, writers: Sequence[MetricsWriter], rates: ThroughputUnits) -> None:
        self._sinks = writers
        self._rates = rates
        self._interval = ThroughputWindow()
        self._faulty: set[MetricsWriter] = set()

    def describe(self, description: Mapping[str, Any]) -> None:
        self._each(lambda writer: writer.describe(description))

    def on_start(self, completed_steps: int) -> None:
        if self._rates.peak_flops is None:
            logger.info(
                "throughput/mfu is 0: the peak FLOP/s of this device at this precision is not known",
                extra={"event": "note"},
            )

    def on_step(self, metrics: StepMetrics) -> None:
        self._interval.add(metrics, self._rates.flops_per_token[len(metrics.heads.losses) - 1])
        self._each(lambda writer: writer.advance(metrics.step))
        if metrics.ranks:
            self._write(metrics.step, step_scalars(metrics, self._interval, self._rates.peak_flops))
            self._interval = ThroughputWindow()

    def on_validation(self, step: int, name: str | None, heads: HeadMetrics) -> None:
        self._write(step, validation_scalars(heads, name, self._rates.bytes_per_token[name]))

    def note(self, text: str) -> None:
        self._each(lambda writer: writer.note(text))

    def on_end(self, reason: StopReason | None) -> None:
        failed = reason not in (StopReason.LAST_STEP, StopReason.SIGNAL)
        self._each(lambda writer: writer.close(failed))

    def _write(self, step: int, scalars: Scalars) -> None:
        self._each(lambda writer: writer.write(step, scalars))

    def _each(self, action: Callable[[MetricsWriter], None]) -> None:
        for writer in self._sinks:
            try:
                action(writer)
            except OSError as error:
                if writer not in self._faulty:
                    self._faulty.add(writer)
                    logger.warning("%s cannot be written, training continues: %s", writer.name, error)


def json_number(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON does not have, so that any program can read the rest."""
    return value if value is not None and math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a line of `metrics.jsonl`; infinity where the run was killed while it wrote the line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class MetricsFile(MetricsWriter):
    """`metrics.jsonl`: one JSON object a line, `step` and the scalars in full precision.

    What a full disk has no room for is written with the next line that it has room for.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, completed_steps: int = 0) -> None:
        """Keep the lines up to update `completed_steps`; later ones are of steps that will be made again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= completed_steps]
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        unfinished.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Scalars) -> None:
        record = {"step": step} | {name: json_number(value) for name, value in scalars.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # a run that is killed keeps every line

    def close(self, failed: bool) -> None:
        self._file.close()
