"""`mtp-dist experiment`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mtp_dist.cli.options import AsJson
from mtp_dist.cli.progress import TaskProgress
from mtp_dist.cli.tables import show_result
from mtp_dist.errors import LaunchError, UserError, exits_with_user_errors

if TYPE_CHECKING:  # they import torch, which would delay `--help`
    from mtp_dist.experiments.grid import Run
    from mtp_dist.experiments.schema import Experiment


@exits_with_user_errors
def experiment(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="An experiment of --list, or the path of a YAML file.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Size: small (an hour on two cores), gpu (ten minutes on one GPU) or paper.")
    ] = "small",
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the trainings as a SLURM job array instead.")] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Execute the code that the models write, in a sandbox.")
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List the experiments.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate the grid of an experiment, then show its tables and plot.

    Ctrl-C stops it; the same command continues. The exit status is 1 if a run has failed.
    """
    from mtp_dist.experiments.evaluations import EXECUTES_CODE
    from mtp_dist.experiments.grid import expand
    from mtp_dist.experiments.schema import find_experiment, load_experiment

    if list_all:
        _list_experiments(as_json)
        return
    if name is None:
        raise UserError("name an experiment, such as `mtp-dist experiment smoke`; --list shows all")
    path = find_experiment(name)
    settings = load_experiment(path, preset)
    runs = expand(path, settings)
    if slurm:
        _submit(settings, runs, as_json)
        return
    if settings.evaluation.function == EXECUTES_CODE and not allow_code_execution:
        raise LaunchError(
            f"{path}: evaluation.function = '{EXECUTES_CODE}' executes code that the models have written: permit it "
            "with --allow-code-execution. It runs in a sandbox, see docs/evaluation.md"
        )
    raise typer.Exit(_run(path, preset, settings, runs, as_json))


def _list_experiments(as_json: bool) -> None:
    from mtp_dist.experiments.listing import listing

    found = listing()
    table = Table("experiment", "title", "paper", "runs by preset")
    for row in found:
        counts = ", ".join(f"{preset} {count}" for preset, count in row["runs"].items())
        table.add_row(row["name"], row["title"], row["paper"], counts)
    show_result(found, as_json, table)


def _submit(settings: "Experiment", runs: Sequence["Run"], as_json: bool) -> None:
    from mtp_dist.experiments.slurm import submit
    from mtp_dist.fs import explain_os_errors

    with explain_os_errors(Path(settings.output_dir), "write"):
        jobs = submit(settings, runs)
    text = f"submitted the arrays {', '.join(jobs)}" if jobs else "all trainings are finished"
    show_result({"jobs": jobs}, as_json, Text(f"{text}; then the same command without --slurm evaluates them"))


def _run(path: Path, preset: str, settings: "Experiment", runs: Sequence["Run"], as_json: bool) -> int:
    """Run what is left of an experiment, write and show its result, and return the exit status."""
    import torch

    from mtp_dist.experiments.results import write_origin
    from mtp_dist.experiments.runner import TaskRunner, device_slots, hold_lock, visible_gpus
    from mtp_dist.experiments.tasks import plan
    from mtp_dist.fs import explain_os_errors
    from mtp_dist.provenance import usable_cores
    from mtp_dist.training.stopping import exit_status

    on_cpu = settings.base.get("run", {}).get("device") == "cpu"
    gpus = visible_gpus(0 if on_cpu else torch.cuda.device_count())
    slots = device_slots(settings.ranks, usable_cores(), gpus, settings.runs_per_gpu)
    folder = Path(settings.output_dir)
    waits = "waiting for the processes of an earlier start to end"
    with explain_os_errors(folder, "write"), hold_lock(folder, lambda: typer.echo(waits, err=True)) as lock:
        tasks = plan(settings, runs)
        if not all(task.is_done() for task in tasks):
            write_origin(folder, continues=any(task.log.exists() for task in tasks))
        with TaskProgress(settings.title, tasks) as progress:
            outcome = TaskRunner(tasks, slots, progress, lock).run()
        if outcome.signal:
            typer.echo("stopped: the same command continues", err=True)
            return exit_status(outcome.signal)
        _show(path, preset, settings, runs, as_json)
    for task, reason in outcome.failures.items():
        typer.echo(f"failed: {task.label}: {task.kind}: {reason}", err=True)
    return 1 if outcome.failures else 0


def _show(path: Path, preset: str, settings: "Experiment", runs: Sequence["Run"], as_json: bool) -> None:
    """Write `result.json`, `table.md` and `plot.png` into the experiment's folder, and show the tables."""
    from mtp_dist.experiments.plot import draw
    from mtp_dist.experiments.results import build_result
    from mtp_dist.experiments.tables import comparison_rows, markdown, metric_rows, origin
    from mtp_dist.fs import atomic_write_text

    folder = Path(settings.output_dir)
    result = build_result(path, preset, settings, runs)
    atomic_write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    draw(result, folder / "plot.png")
    atomic_write_text(folder / "table.md", markdown(result, "plot.png"))
    tables = [_table(rows) for rows in (metric_rows(result), comparison_rows(result))]
    files = Text(f"{folder}{os.sep}: result.json, table.md, plot.png")
    show_result(result, as_json, Text(settings.title), *tables, Text(origin(result)), files)


def _table(rows: list[list[str]]) -> Table:
    table = Table(*map(escape, rows[0]))
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table
