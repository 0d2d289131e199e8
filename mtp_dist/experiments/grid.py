"""The trainings of an experiment: one per cell of its grid and seed, each with a checked configuration and a folder."""

import copy
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_dist.config import build_config
from mtp_dist.errors import ConfigError
from mtp_dist.experiments.schema import Experiment

PRETRAINING = "pretraining."
"""Prefix of an arm's keys that configure the training before a run."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One training: a configuration and the folder that it writes into."""

    label: str
    folder: Path
    config: Values
    start: "Training | None" = None
    """Training whose last checkpoint this one starts from; None to start from scratch."""

    @property
    def steps(self) -> int:
        return int(self.config["train"]["steps"])


@dataclass(frozen=True)
class Run:
    """One training that is evaluated: a cell of the grid with one seed."""

    cell: Mapping[str, str]
    """Arm by axis."""
    seed: int
    training: Training


def cell_label(cell: Mapping[str, str]) -> str:
    return ", ".join(cell.values())


def expand(path: Path, experiment: Experiment) -> list[Run]:
    """Return the runs of the grid, all cells of the first seed before those of the second.

    path: the experiment's file, for messages. Raise ConfigError if a run's configuration is invalid.
    """
    runs: list[Run] = []
    pretrainings: dict[str, Training] = {}
    axes = list(experiment.grid)
    for seed, arms in itertools.product(experiment.seeds, itertools.product(*experiment.grid.values())):
        cell = dict(zip(axes, arms, strict=True))
        label = cell_label(cell)
        try:
            start = None
            if experiment.pretraining is not None:
                found = _pretraining(experiment, cell, label, seed)
                start = pretrainings.setdefault(_identity(found), found)
            elif unused := [key for key, _ in _arm_keys(experiment, cell) if key.startswith(PRETRAINING)]:
                raise ConfigError(f"{unused[0]} has no effect without `pretraining`: add `pretraining: {{}}`")
            runs.append(Run(cell, seed, _training(experiment, _run_sections(experiment, cell), label, seed, start)))
        except ConfigError as error:
            lines = (f"{path}: {line} (in the cell {label})" for line in str(error).splitlines())
            raise ConfigError("\n".join(lines)) from None
    return runs


def _run_sections(experiment: Experiment, cell: Mapping[str, str]) -> Values:
    """Return the sections of a cell's configuration, with `total_layers` at the top."""
    sections: Values = {"total_layers": experiment.total_layers, **copy.deepcopy(experiment.base)}
    _set_keys(sections, {key: value for key, value in _arm_keys(experiment, cell) if not key.startswith(PRETRAINING)})
    return sections


def _pretraining(experiment: Experiment, cell: Mapping[str, str], label: str, seed: int) -> Training:
    sections = _run_sections(experiment, cell)
    for name, section in (experiment.pretraining or {}).items():
        if not isinstance(section, dict):
            raise ConfigError(f"pretraining.{name} should have keys of its own")
        _set_keys(sections, {f"{name}.{key}": value for key, value in section.items()})
    keys = _arm_keys(experiment, cell)
    _set_keys(sections, {key.removeprefix(PRETRAINING): value for key, value in keys if key.startswith(PRETRAINING)})
    return _training(experiment, sections, f"pretraining of {label}", seed)


def _arm_keys(experiment: Experiment, cell: Mapping[str, str]) -> list[tuple[str, Any]]:
    return [item for axis, arm in cell.items() for item in experiment.grid[axis][arm].items()]


def _set_keys(sections: Values, keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        *parents, name = key.split(".")
        if not parents and name != "total_layers":
            raise ConfigError(f"grid: {key} is not of the form section.key, such as heads.count")
        section = sections
        for parent in parents:
            section = _subsection(section, parent)
        section[name] = copy.deepcopy(value)


def _subsection(section: Values, name: str) -> Values:
    """Return the mapping of that name, created if absent. Raise ConfigError if it is another value."""
    found = section.setdefault(name, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{name} should have keys of its own")
    return found


def _identity(training: Training) -> str:
    """Return what equal trainings have in common: everything but names."""
    run = {key: value for key, value in training.config["run"].items() if key not in ("name", "output_dir")}
    return json.dumps(training.config | {"run": run}, sort_keys=True)


def _training(
    experiment: Experiment, sections: Values, label: str, seed: int, start: Training | None = None
) -> Training:
    """Return a training with a checked configuration. One that starts from another has the architecture of that."""
    label = f"{label}, seed {seed}"
    folder = Path(experiment.output_dir, label.replace(", ", "_").replace(" ", "-"))
    _set_keys(sections, {"run.name": label, "run.output_dir": str(folder), "run.seed": seed})
    total_layers = sections.pop("total_layers")
    if start:
        sections["model"] = copy.deepcopy(start.config["model"])
        _set_keys(sections, {"checkpoint.initial_weights": str(start.folder)})
    elif total_layers:
        _share_layers(sections, total_layers)
    build_config(sections)
    return Training(label, folder, sections, start)


def _share_layers(sections: Values, total_layers: Any) -> None:
    """Give the trunk the layers that the heads leave."""
    if type(total_layers) is not int:
        raise ConfigError(f"total_layers = {total_layers!r} is invalid: it should be a valid integer")
    model = _subsection(sections, "model")
    if "trunk_layers" in model:
        raise ConfigError("model.trunk_layers follows from total_layers: remove one of them")
    model["trunk_layers"] = 1
    heads = build_config(sections).heads
    model["trunk_layers"] = total_layers - heads.num_blocks * heads.block_layers
    if model["trunk_layers"] < 1:
        raise ConfigError(f"total_layers = {total_layers} leaves the trunk no layer: the heads have all of them")
