"""`--watch` of the commands that evaluate a model."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mtp_dist.errors import ConfigError

Watch = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Folder of a run: evaluate each of its checkpoints until its training ends."),
]
Once = Annotated[bool, typer.Option("--once", help="With --watch: end after the checkpoints that exist.")]


def check_subject(model: str | None, watch: str | None) -> None:
    """Raise ConfigError unless exactly one of --model and --watch is given."""
    if (model is None) == (watch is None):
        raise ConfigError("give either --model, to evaluate one model, or --watch, to follow a run")


def watch_run(run: str, label: str, evaluate: Callable[[Path], dict[str, float]], once: bool, as_json: bool) -> None:
    """Evaluate the checkpoints of a run, and print a line for each.

    label and evaluate: see `mtp_dist.evaluation.watch`.
    """
    from mtp_dist.evaluation.watch import watch

    for evaluation in watch(Path(run).expanduser(), label, evaluate, once):
        values = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
        print(json.dumps(asdict(evaluation)) if as_json else f"step {evaluation.step}: {values}", flush=True)
