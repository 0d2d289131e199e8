"""`mtp-dist evaluate synthetic`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mtp_dist.cli.options import AsJson, model_folder
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.cli.tables import show_result
from mtp_dist.cli.watching import Once, Watch, check_subject, watch_run
from mtp_dist.errors import exits_with_user_errors


@exits_with_user_errors
def synthetic(
    task: Annotated[str, typer.Option(help="induction, arithmetic, agreement, star-graph or choices.")],
    model: Annotated[str | None, typer.Option(help="Folder of an export, of a checkpoint or of a run.")] = None,
    watch: Watch = None,
    once: Once = False,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="Parameters of the task, such as documents=2000; by default those of the training.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure accuracies on held-out documents of a synthetic task, of a model or of each checkpoint of a run."""
    check_subject(model, watch)
    from transformers.utils import logging as transformers_logging

    from mtp_dist.config.loader import read_options
    from mtp_dist.evaluation.synthetic import evaluate_synthetic

    transformers_logging.set_verbosity_error()
    given = read_options(options or [])

    def run(folder: Path) -> dict[str, Any]:
        with progress_bar() as bar:
            return evaluate_synthetic(folder, task, given, on_progress=updates(bar, "documents"))

    def accuracies(folder: Path) -> dict[str, float]:
        return {f"{task}/{group}": score["accuracy"] for group, score in run(folder)["groups"].items()}

    if watch is not None:
        label = shlex.join(["synthetic", "--task", task, *(options or [])])
        watch_run(watch, label, accuracies, once, as_json)
        return
    assert model is not None
    result = run(model_folder(model))
    show_result(result, as_json, _table(result))


def _table(result: dict[str, Any]) -> Table:
    options = ", ".join(f"{name} {value}" for name, value in result["options"].items())
    title = f"{result['task']} ({options}), {result['documents']:,} documents of the split '{result['split']}'"
    table = Table("answers", "right", "of", "accuracy", "chance", title=title)
    for group, score in result["groups"].items():
        counts = (f"{score['correct']:,}", f"{score['total']:,}")
        table.add_row(group, *counts, f"{score['accuracy']:.1%}", f"{score['chance']:.1%}")
    return table
