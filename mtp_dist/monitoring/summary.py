"""What a reader sees when a run has ended, and the same numbers for programs in `summary.json`."""

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

from mtp_dist.metrics import HeadMetrics
from mtp_dist.monitoring.callbacks import bits_per_byte, json_number


@dataclass(frozen=True)
class ValidationResult:
    """The last validation of a run on one set."""

    name: str | None
    heads: HeadMetrics
    unigram_entropy: float
    """Entropy of the validation corpus's token frequencies, in nats: the loss of a head that learnt only these."""
    bytes_per_token: float
    """Mean length of a validation token, in bytes of text."""


@dataclass(frozen=True)
class RunSummary:
    """Everything that the end of a run shows and writes."""

    name: str
    steps: int
    """Optimizer updates made."""
    tokens_per_second: float
    """Trained positions per second over the whole run, all ranks together."""
    output_dir: Path
    validation: Sequence[ValidationResult] = ()
    """One for each validation set."""
    sample: str | None = None
    """Text that the trained model wrote."""
    tensorboard_dir: Path | None = None
    checkpoint: Path | None = None


def _head_table(validation: ValidationResult) -> Table:
    table = Table(title=f"Validation on {validation.name}" if validation.name else "Validation")
    for column in ("head", "loss (nats)", "bits per byte", "below unigram", "accuracy"):
        table.add_column(column, justify="right")
    heads, unigram, length = validation.heads, validation.unigram_entropy, validation.bytes_per_token
    for k, (loss, accuracy) in enumerate(zip(heads.losses, heads.accuracies, strict=True), 1):
        if loss is None or accuracy is None:
            table.add_row(f"{k}", *"----")
            continue
        below = f"{1 - loss / unigram:.1%}" if unigram else "-"
        table.add_row(f"{k}", f"{loss:.4f}", f"{bits_per_byte(loss, length):.4f}", below, f"{accuracy:.1%}")
    table.add_section()
    table.add_row("unigram entropy", f"{unigram:.4f}", f"{bits_per_byte(unigram, length):.4f}")
    return table


def _printable(text: str) -> Text:
    """A model can write any bytes, those that control a terminal too."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4)))


def print_summary(summary: RunSummary, console: Console | None = None) -> None:
    """Show the result of a run on `console`, standard output when absent."""
    console = console or Console()
    for validation in summary.validation:
        console.print(_head_table(validation))
    if summary.sample is not None:
        console.print(Panel(_printable(summary.sample), title="Sample"))
    facts = {"Steps": f"{summary.steps:,}", "Tokens per second": f"{summary.tokens_per_second:,.0f}"}
    facts["Run folder"] = str(summary.output_dir)
    if summary.checkpoint:
        facts["Checkpoint"] = str(summary.checkpoint)
    if summary.tensorboard_dir:
        facts["TensorBoard folder"] = str(summary.tensorboard_dir)
        facts["Show the curves"] = shlex.join(["tensorboard", "--logdir", str(summary.tensorboard_dir)])
    for label, value in facts.items():
        # Not wrapped: a path or a command that is broken over two lines cannot be copied.
        console.print(Text(f"{label + ':':<20}{value}"), soft_wrap=True)


def _validation_record(validation: ValidationResult) -> dict[str, Any]:
    heads, unigram, length = validation.heads, validation.unigram_entropy, validation.bytes_per_token
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
        "unigram_entropy": unigram,
        "unigram_bits_per_byte": bits_per_byte(unigram, length),
        "bytes_per_token": length,
    }


def write_summary(summary: RunSummary) -> Path:
    """Write `summary.json` into the run folder: losses and entropies in nats, paths as text, null for what is absent.

    Returns the file's path.
    """
    record = {
        "name": summary.name,
        "steps": summary.steps,
        "tokens_per_second": summary.tokens_per_second,
        "validation": [_validation_record(validation) for validation in summary.validation],
        "sample": summary.sample,
        "output_dir": str(summary.output_dir),
        "tensorboard_dir": str(summary.tensorboard_dir) if summary.tensorboard_dir else None,
        "checkpoint": str(summary.checkpoint) if summary.checkpoint else None,
    }
    path = summary.output_dir / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path
