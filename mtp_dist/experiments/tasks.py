"""The programs that an experiment runs, trainings and evaluations, and the files that show how far each has come."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from mtp_dist.config import read_values
from mtp_dist.errors import ConfigError
from mtp_dist.experiments.evaluations import measured
from mtp_dist.experiments.grid import Run, Training
from mtp_dist.experiments.schema import Evaluation, Experiment
from mtp_dist.fs import atomic_write_text

CONFIG, EVALUATION = "config.yaml", "evaluation.json"
"""Files in a run's folder, next to those of the training."""
LAST_LINES_BYTES = 8192
"""Bytes at the end of `metrics.jsonl` that contain its last complete line."""


@dataclass(frozen=True, eq=False)
class Task:
    """A program that runs once and leaves its result in a folder."""

    kind: str
    """`training` or `evaluation`."""
    label: str
    folder: Path
    is_done: Callable[[], bool]
    """Returns whether the result is there, also from an earlier start."""
    command: Callable[[], Sequence[str]]
    """Returns the program and its arguments, which depend on what an earlier start has left."""
    fraction: Callable[[], float] = field(default=lambda: 0.0)
    """Returns how much of the running task is done."""
    after: "Task | None" = None
    """Task that must be done before."""

    @property
    def log(self) -> Path:
        """File with the program's output."""
        return self.folder / f"{self.kind}.log"


def plan(experiment: Experiment, runs: Sequence[Run]) -> list[Task]:
    """Return the trainings of the runs, each with its evaluation, and write the trainings' configurations.

    Raise ConfigError if a folder has a training with another configuration.
    """
    tasks: list[Task] = []
    pretrainings: dict[Path, Task] = {}
    for run in runs:
        start = run.training.start
        if start and start.folder not in pretrainings:
            pretrainings[start.folder] = _training_task(start, experiment.ranks, None)
            tasks.append(pretrainings[start.folder])
        training = _training_task(run.training, experiment.ranks, pretrainings[start.folder] if start else None)
        tasks += [training, _evaluation_task(run.training, experiment.evaluation, training)]
    return tasks


def config_path(training: Training) -> Path:
    return training.folder / CONFIG


def write_config(training: Training) -> None:
    """Write the training's configuration. Raise ConfigError if its folder has another one."""
    path = config_path(training)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, yaml.safe_dump(training.config, sort_keys=False))
        return
    earlier, now = read_values(path), training.config
    changed = sorted(
        f"{section}.{key}"
        for section in earlier.keys() | now.keys()
        for key in {**earlier.get(section, {}), **now.get(section, {})}
        if earlier.get(section, {}).get(key) != now.get(section, {}).get(key)
    )
    if changed:
        raise ConfigError(
            f"{training.folder} has a run with another {', '.join(changed)}: remove that folder to train again, or "
            "give the experiment another output_dir"
        )


def is_trained(training: Training) -> bool:
    return (training.folder / "summary.json").exists()


def resume_from(training: Training) -> str:
    """Return the training's `checkpoint.resume`.

    That is `none` after a kill between the last checkpoint and the summary: a run that resumes from its last step
    writes no summary.
    """
    return "none" if (training.folder / "checkpoints" / f"step_{training.steps:08d}").exists() else "auto"


def _training_task(training: Training, ranks: int, after: Task | None) -> Task:
    write_config(training)

    def command() -> list[str]:
        launch = [sys.executable, "-m", "mtp_dist.cli", "launch", "--ranks", str(ranks)]
        return [*launch, "--config", str(config_path(training)), f"checkpoint.resume={resume_from(training)}"]

    return Task(
        kind="training",
        label=training.label,
        folder=training.folder,
        is_done=lambda: is_trained(training),
        command=command,
        fraction=lambda: _completed_steps(training.folder) / training.steps,
        after=after,
    )


def _completed_steps(folder: Path) -> int:
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_LINES_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0  # not written yet


def _evaluation_task(training: Training, evaluation: Evaluation, after: Task) -> Task:
    output = training.folder / EVALUATION
    arguments = [evaluation.function, json.dumps(evaluation.options), str(training.folder), str(output)]
    return Task(
        kind="evaluation",
        label=training.label,
        folder=training.folder,
        is_done=lambda: measured(evaluation.function, evaluation.options, output) is not None,
        command=lambda: [sys.executable, "-m", "mtp_dist.experiments.evaluations", *arguments],
        after=after,
    )
