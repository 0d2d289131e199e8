"""`mtp-dist evaluate lm-eval`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.table import Table

from mtp_dist.cli.options import AsJson, model_folder
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.cli.tables import show_result
from mtp_dist.cli.watching import Once, Watch, check_subject, watch_run
from mtp_dist.errors import ConfigError, exits_with_user_errors

if TYPE_CHECKING:  # lm-eval takes seconds to import
    from mtp_dist.evaluation.lm_eval_tasks import TaskOptions


@exits_with_user_errors
def lm_eval(
    tasks: Annotated[str, typer.Option(metavar="TASK,...", help="Tasks or groups of lm-eval, separated by commas.")],
    model: Annotated[str | None, typer.Option(help="Folder of an export, of a checkpoint or of a run.")] = None,
    watch: Watch = None,
    once: Once = False,
    include_path: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder with YAML files of further tasks.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question; by default the task's number.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples per task; by default all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 8,
    speculative: Annotated[
        int | None,
        typer.Option(metavar="K", help="Number of heads that predict in texts; by default as many as are fastest."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write lm-eval's complete results, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model, or each checkpoint of a run that is training, on tasks of EleutherAI's lm-eval."""
    check_subject(model, watch)
    if watch is not None and output is not None:
        raise ConfigError("--output is for --model: with --watch the results are in the run's evaluations.jsonl")
    package = _installed_version()
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # bars of lm-eval and datasets, read when they are imported
    from mtp_dist.evaluation.lm_eval_tasks import TaskOptions, load_tasks, metrics

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with _tasks_write_to_stderr(), progress_bar() as bar:
        bar.add_task("loading tasks", total=None)
        loaded = load_tasks(names, Path(include_path).expanduser() if include_path else None)
    options = TaskOptions(num_fewshot, limit)

    def run(folder: Path) -> dict[str, Any]:
        return _run(folder, loaded, options, batch_size, speculative)

    if watch is not None:
        settings = {"--num-fewshot": num_fewshot, "--limit": limit}
        given = [word for name, value in settings.items() if value is not None for word in (name, str(value))]
        label = shlex.join(["lm-eval", "--tasks", ",".join(names), *given])
        watch_run(watch, label, lambda folder: metrics(run(folder)), once, as_json)
        return
    assert model is not None
    results = run(model_folder(model))
    result = {"model": model, "lm_eval": package, **_summary(results)}
    show_result(result, as_json, _table(result))
    if output:  # last: an error of the disk does not take away the table
        _write(Path(output).expanduser(), results)


def _tasks_write_to_stderr() -> redirect_stdout[TextIO]:
    """Keep what the code of tasks prints out of the results."""
    return redirect_stdout(sys.stderr)


def _installed_version() -> str:
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        raise ConfigError(
            "mtp-dist evaluate lm-eval needs the package lm-eval, which is not installed: pip install lm-eval"
        ) from None


def _run(
    folder: Path, tasks: list[Any], options: TaskOptions, batch_size: int, speculative: int | None
) -> dict[str, Any]:
    """Open a model and return lm-eval's results."""
    from transformers.utils import logging as transformers_logging

    from mtp_dist.evaluation.lm_eval_model import MTPModel
    from mtp_dist.evaluation.lm_eval_tasks import run_tasks
    from mtp_dist.inference.generator import Generator

    transformers_logging.set_verbosity_error()
    with _tasks_write_to_stderr(), progress_bar() as bar:
        generator = Generator.open_on_device(folder, updates(bar, "verifying"))
        return run_tasks(MTPModel(generator, batch_size, speculative, updates(bar, "requests")), tasks, options)


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of lm-eval's results, and what they were measured with."""
    from mtp_dist.evaluation.lm_eval_tasks import rows

    return {
        "metrics": {name: {"value": value, "standard_error": error} for name, value, error in rows(results)},
        "examples": {task: count["effective"] for task, count in results["n-samples"].items()},
        "num_fewshot": results["n-shot"],
        "decoding": results["decoding"],
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table("task", "examples", "shots", "metric", "value", "standard error", title=result["model"])
    for name, metric in result["metrics"].items():
        task, _, rest = name.partition("/")
        counts = (str(result[key].get(task, "")) for key in ("examples", "num_fewshot"))
        error = metric["standard_error"]
        table.add_row(task, *counts, rest, f"{metric['value']:.4f}", "" if error is None else f"{error:.4f}")
    if decoding := result["decoding"]:
        table.caption = (
            f"{decoding['tokens']:,} tokens generated, {decoding['tokens_per_forward']:.2f} per forward pass"
        )
    return table


def _write(path: Path, results: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    from mtp_dist.fs import explain_os_errors

    with explain_os_errors(path, "write"):
        path.write_text(json.dumps(results, indent=2, default=handle_non_serializable) + "\n", encoding="utf-8")
