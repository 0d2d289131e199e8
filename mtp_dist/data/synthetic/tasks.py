"""All synthetic tasks by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mtp_dist.config.synthetic import SYNTHETIC_PREFIX, SyntheticConfig
from mtp_dist.data.synthetic.agreement import Agreement
from mtp_dist.data.synthetic.arithmetic import Arithmetic
from mtp_dist.data.synthetic.choices import Choices
from mtp_dist.data.synthetic.induction import Induction
from mtp_dist.data.synthetic.star_graph import StarGraph
from mtp_dist.data.synthetic.task import Task
from mtp_dist.errors import ConfigError

TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (Induction, Arithmetic, Agreement, StarGraph, Choices)}


def task_kind(path: str, label: str) -> type[Task]:
    """Return the task of a path such as `synthetic/induction`, or of its name alone.

    Raise ConfigError, starting with `label`, if there is none.
    """
    name = path.removeprefix(SYNTHETIC_PREFIX)
    if name not in TASKS:
        prefix = path[: len(path) - len(name)]
        raise ConfigError(f"{label} is not a synthetic task: use one of {', '.join(prefix + name for name in TASKS)}")
    return TASKS[name]


def task_parameters(kind: type[Task], options: SyntheticConfig, key: str) -> dict[str, Any]:
    """Return the given parameters of a task.

    key: start of their names in errors, such as `data.train.0.options.`. Raise ConfigError if one belongs to another
    task.
    """
    known = [field.name for field in fields(kind)]
    given = options.model_dump(exclude_none=True, exclude={"documents", "seed"})
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{key}{name} is not a parameter of '{SYNTHETIC_PREFIX}{kind.name}': it has {', '.join(known)}"
            )
    return given


def build_task(kind: type[Task], options: SyntheticConfig, key: str) -> Task:
    """Return the task with these parameters and its defaults for others.

    key: as in `task_parameters`. Raise ConfigError if a parameter belongs to another task, or if they do not fit
    together.
    """
    task = kind(**task_parameters(kind, options, key))
    if problem := task.problem():
        raise ConfigError(f"{key}{problem}")
    return task
