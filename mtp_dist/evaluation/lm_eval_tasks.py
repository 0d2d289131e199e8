"""Tasks of lm-eval: those of the package, of this project and of a folder, loaded and run on a trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from mtp_dist.errors import ConfigError, DataError
from mtp_dist.evaluation.lm_eval_model import MTPModel

LOCAL_TASKS = Path(__file__).parent / "tasks"
"""Folder of the tasks that come with this project and need no network."""

BOOTSTRAP_ITERATIONS = 1000
"""Resamplings for the standard error of metrics that are not means."""

Metrics = dict[str, float]
"""Values by `<task>/<metric>`, with the filter of the answers as a third part unless it is `none`."""


@dataclass(frozen=True)
class TaskOptions:
    """The examples that each task evaluates, and the solved ones before each."""

    num_fewshot: int | None = None
    """Number of solved examples before each question; by default the task's own."""
    limit: int | None = None
    """Number of examples per task; by default all."""


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> list[Any]:
    """Return the tasks and groups of these names, in which `*` and `?` are wildcards, with their data.

    include_path: a folder with YAML files of further tasks. Raise ConfigError for an unknown name, DataError if the
    data of a task cannot be read.
    """
    if not names:
        raise ConfigError("--tasks names no task: give one, such as python_docs_choice")
    if include_path and not include_path.is_dir():
        raise ConfigError(f"--include-path = '{include_path}' is not a folder: give one with YAML files of tasks")
    for library in ("lm_eval", "huggingface_hub"):  # warnings about YAML files of its own, and about each retry
        logging.getLogger(library).setLevel(logging.ERROR)
    folders = [LOCAL_TASKS, *([include_path] if include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(set(manager.match_tasks([name])) & set(manager.all_subtasks) for name in names):
        manager = TaskManager(include_path=folders)  # reads the thousands of YAML files of lm-eval, for 15 seconds
    matches = [match for name in names for match in _matches(manager, name)]
    tasks = [task for name in dict.fromkeys(matches) for task in _load(manager, name)]
    try:
        manager.load(tasks)
    except ValueError as error:  # a task is also in a group
        raise ConfigError(f"--tasks names a task twice ({error}): leave one of them out") from None
    return tasks


def _matches(manager: TaskManager, name: str) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if not found:
        near = get_close_matches(name, manager.all_tasks, 3, 0.5)
        nearest = f": the nearest ones are {', '.join(near)}" if near else ""
        raise ConfigError(
            f"--tasks = '{name}' is not a task of lm-eval{nearest or ', nor of --include-path: correct it'}"
        )
    return found


def _load(manager: TaskManager, name: str) -> list[Any]:
    """Return a group, or the tasks that a name stands for."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # what `datasets` and the tasks' own code raise has no common class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"--tasks = '{name}' cannot be loaded ({reason}): if its data is on the Hugging Face hub and this machine "
            "has no network, run the command once on one that has, with HF_HOME on a disk that both share"
        ) from None
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"--tasks = '{name}' executes generated code, which lm-eval does not confine: see mtp-dist evaluate "
                "humaneval, which has a sandbox"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"--tasks = '{name}' has images or sound, the model reads text only: leave it out")
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def run_tasks(model: MTPModel, tasks: Sequence[Any], options: TaskOptions) -> dict[str, Any]:
    """Return lm-eval's results, and under `decoding` the counts of generated texts, if there are any."""
    # Otherwise each call asks pip, lspci and git about this machine, for five seconds.
    with patch.multiple(evaluator, create=True, add_env_info=lambda results: None, get_git_commit_hash=lambda: None):
        results: dict[str, Any] = evaluator.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            task_manager=TaskManager(include_defaults=False),
        )
    counts = model.statistics
    results["decoding"] = {"tokens": counts.tokens, "tokens_per_forward": counts.tokens_per_forward}
    if not counts.tokens:
        results["decoding"] = None
    return results


def metrics(results: Mapping[str, Any]) -> Metrics:
    """Return the values of lm-eval's results, without their standard errors."""
    return {name: value for name, value, _ in rows(results)}


def rows(results: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Yield the name `<task>/<metric>`, the value and the standard error of each metric."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            name = "/".join([task, metric] + [kind] * (kind != "none"))
            yield name, float(value), error if isinstance(error, float) else None
