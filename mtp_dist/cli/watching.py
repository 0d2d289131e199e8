"""`--watch` of the commands that evaluate a model."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

Watch = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Folder of a run: evaluate each of its checkpoints until its training ends."),
]
Once = Annotated[bool, typer.Option("--once", help="With --watch: end after the checkpoints that exist.")]


def watch_run(run: str, label: str, evaluate: Callable[[Path], dict[str, float]], once: bool, as_json: bool) -> None:
    """Evaluate the checkpoints of a run, and print a line for each.

    label and evaluate: see `mtp_dist.evaluation.watch`.
    """
    from mtp_dist.evaluation.watch import watch

    for evaluation in watch(Path(run).expanduser(), label, evaluate, once):
        values = ", ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
        print(json.dumps(asdict(evaluation)) if as_json else f"step {evaluation.step}: {values}", flush=True)
