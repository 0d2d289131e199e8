"""Result of a finished run: tables on standard output and `summary.json` for programs."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mtp_dist.config import Config
from mtp_dist.data.datasets import ValidationSet
from mtp_dist.fs import atomic_write_text
from mtp_dist.metrics import HeadMetrics, StepMetrics
from mtp_dist.monitoring.callback import Callback
from mtp_dist.monitoring.scalars import acceptance_scalars, bits_per_byte, json_number


@dataclass(frozen=True)
class RunSummary:
    """The result of a finished run."""

    name: str
    steps: int
    """Completed optimizer steps."""
    tokens_per_second: float
    """Trained positions per second since the start or restart, all ranks together."""
    output_dir: Path
    validation: Sequence[tuple[ValidationSet, HeadMetrics]] = ()
    """The last validation on each set."""
    upper_estimate: bool = False
    """True if the heads read true tokens in a validation, but their own drafts when they decode."""
    sample: str | None = None
    """Text sampled from the trained model."""
    tensorboard_dir: Path | None = None
    checkpoint: Path | None = None


class SummaryRecorder(Callback):
    """Callback that collects the statistics of a run's summary. For rank 0 only."""

    def __init__(self, config: Config, validation_sets: Sequence[ValidationSet]) -> None:
        self._config = config
        self._validation_sets = validation_sets
        self._last_validation: dict[str | None, HeadMetrics] = {}
        self._tokens = 0
        self._seconds = 0.0

    def on_step(self, metrics: StepMetrics) -> None:
        self._tokens += metrics.tokens
        self._seconds += metrics.seconds

    def on_validation(self, step: int, name: str | None, heads: HeadMetrics) -> None:
        self._last_validation[name] = heads

    def summary(self, checkpoint: Path) -> RunSummary:
        """Return the summary of the finished run; checkpoint: its last one."""
        config = self._config
        return RunSummary(
            name=config.run.name,
            steps=config.train.steps,
            tokens_per_second=self._tokens / self._seconds,
            output_dir=config.output_dir,
            validation=[(each, self._last_validation[each.name]) for each in self._validation_sets],
            upper_estimate=config.heads.reads_drafts,
            tensorboard_dir=config.output_dir / "tensorboard" if config.log.tensorboard else None,
            checkpoint=checkpoint,
        )


def _head_table(validation: ValidationSet, heads: HeadMetrics, upper_estimate: bool) -> Table:
    table = Table(title=f"Validation on {validation.name}" if validation.name else "Validation")
    for column in ("head", "loss (nats)", "bits per byte", "below unigram", "accuracy"):
        table.add_column(column, justify="right")
    unigram, length = validation.unigram_entropy, validation.bytes_per_token
    for k, (loss, accuracy) in enumerate(zip(heads.losses, heads.accuracies, strict=True), 1):
        if loss is None or accuracy is None:
            table.add_row(f"{k}", *"----")
            continue
        below = f"{1 - loss / unigram:.1%}" if unigram else "-"
        table.add_row(f"{k}", f"{loss:.4f}", f"{bits_per_byte(loss, length):.4f}", below, f"{accuracy:.1%}")
    table.add_section()
    table.add_row("unigram entropy", f"{unigram:.4f}", f"{bits_per_byte(unigram, length):.4f}")
    if (tokens := heads.expected_tokens_per_forward) is not None:
        label = " (upper estimate)" if upper_estimate else ""
        table.caption = f"{tokens:.2f} tokens per forward pass with all heads' drafts{label}"
    return table


def _printable(text: str) -> Text:
    """Replace characters that control a terminal: a model can write any bytes."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4)))


def print_summary(summary: RunSummary, console: Console | None = None) -> None:
    """Print the result of a run on `console`, by default standard output."""
    console = console or Console()
    for validation, heads in summary.validation:
        console.print(_head_table(validation, heads, summary.upper_estimate))
    if summary.sample is not None:
        console.print(Panel(_printable(summary.sample), title="Sample"))
    facts = {
        "Steps": f"{summary.steps:,}",
        "Tokens per second": f"{summary.tokens_per_second:,.0f}",
        "Run folder": str(summary.output_dir),
    }
    if summary.checkpoint:
        facts["Checkpoint"] = str(summary.checkpoint)
    if summary.tensorboard_dir:
        facts["TensorBoard folder"] = str(summary.tensorboard_dir)
        facts["Show the curves"] = shlex.join(["tensorboard", "--logdir", str(summary.tensorboard_dir)])
    for label, value in facts.items():
        # Not wrapped: a path or command that spans two lines cannot be copied.
        console.print(Text(f"{label + ':':<20}{value}"), soft_wrap=True)


def _validation_record(validation: ValidationSet, heads: HeadMetrics) -> dict[str, Any]:
    unigram, length = validation.unigram_entropy, validation.bytes_per_token
    return {
        "name": validation.name,
        "total": json_number(heads.total),
        "heads": [
            {
                "head": k,
                "loss": json_number(loss),
                "bits_per_byte": None if loss is None else json_number(bits_per_byte(loss, length)),
                "accuracy": json_number(accuracy),
            }
            for k, (loss, accuracy) in enumerate(zip(heads.losses, heads.accuracies, strict=True), 1)
        ],
        **acceptance_scalars(heads),
        "unigram_entropy": unigram,
        "unigram_bits_per_byte": bits_per_byte(unigram, length),
        "bytes_per_token": length,
    }


def write_summary(summary: RunSummary) -> Path:
    """Write `summary.json` into the run's folder and return its path: losses and entropies in nats, null if absent."""
    record = {
        "name": summary.name,
        "steps": summary.steps,
        "tokens_per_second": summary.tokens_per_second,
        "validation": [_validation_record(*validation) for validation in summary.validation],
        "sample": summary.sample,
        "output_dir": str(summary.output_dir),
        "tensorboard_dir": str(summary.tensorboard_dir) if summary.tensorboard_dir else None,
        "checkpoint": str(summary.checkpoint) if summary.checkpoint else None,
    }
    path = summary.output_dir / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")
    return path
