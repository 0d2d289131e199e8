"""The result of an experiment: one JSON object with its runs, their statistics and the verdicts."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from mtp_dist.errors import ConfigError
from mtp_dist.experiments.evaluations import measured
from mtp_dist.experiments.grid import Run, cell_label
from mtp_dist.experiments.schema import Experiment
from mtp_dist.experiments.statistics import interval, paired_difference, verdict
from mtp_dist.experiments.tasks import EVALUATION
from mtp_dist.fs import atomic_write_text
from mtp_dist.provenance import checkout_commit, gpu_names, processor_name, usable_cores
from mtp_dist.versions import installed_versions

ORIGIN = "origin.json"
"""File in an experiment's folder about its starts that ran a task."""

Result = dict[str, Any]
Cell = Mapping[str, str]
T = TypeVar("T")


def build_result(path: Path, preset: str, experiment: Experiment, runs: Sequence[Run]) -> Result:
    """Return the result of the evaluated runs: origin, statistics, and each run's configuration and metrics.

    path: the experiment's file. Raise ConfigError if it names a metric that no run has.
    """
    evaluation = experiment.evaluation
    records: list[dict[str, Any]] = []
    for run in runs:
        output = run.training.folder / EVALUATION
        metrics = measured(evaluation.function, evaluation.options, output)
        if metrics is not None:
            records.append(
                {"cell": dict(run.cell), "seed": run.seed, "metrics": metrics, "config": run.training.config}
            )
    if records and (message := _unknown_metric(experiment, {name for record in records for name in record["metrics"]})):
        raise ConfigError(f"{path}: {message}")
    settings = experiment.model_dump(
        mode="json", include={"title", "question", "paper", "evaluation", "metrics", "compare", "plot"}
    )
    return {
        "experiment": path.stem,
        "preset": preset,
        **_read_json(Path(experiment.output_dir) / ORIGIN),
        **settings,
        "cells": list(_cells(experiment, runs, records)),
        "comparisons": list(_comparisons(experiment, runs, records)),
        "missing_runs": [run.training.label for run in runs if not any(_is_record(record, run) for record in records)],
        "runs": records,
    }


def _unknown_metric(experiment: Experiment, known: set[str]) -> str | None:
    """Return a message about a name that is not a metric of the evaluation, or None."""
    for key, name in experiment.metric_names.items():
        matches = fnmatchcase if key == "plot.metric" else str.__eq__
        if not any(matches(metric, name) for metric in known):
            return (
                f"{key} = '{name}' is not a metric of the evaluation '{experiment.evaluation.function}': give one of "
                f"{', '.join(sorted(known))}"
            )
    return None


def _is_record(record: Mapping[str, Any], run: Run) -> bool:
    return (record["cell"], record["seed"]) == (run.cell, run.seed)


def write_origin(folder: Path, continues: bool) -> None:
    """Write where, when and from which code the tasks of this start are run.

    continues: whether earlier starts ran tasks too. Then their commits come first, such as `9c0a465, 2c531f7`.
    """
    file = folder / ORIGIN
    earlier = (_read_json(file)["commit"] or "").split(", ") if continues and file.exists() else []
    origin = {
        "machine": {"processor": processor_name(), "cores": usable_cores(), "gpus": gpu_names()},
        "time": datetime.now(UTC).isoformat(" ", timespec="seconds"),
        "commit": ", ".join(filter(None, dict.fromkeys([*earlier, checkout_commit()]))) or None,
        "versions": installed_versions(),
    }
    atomic_write_text(file, json.dumps(origin, indent=2) + "\n")


def _distinct_cells(runs: Sequence[Run]) -> list[Cell]:
    return list({cell_label(run.cell): run.cell for run in runs}.values())


def _by_seed(records: Sequence[Mapping[str, Any]], cell: Cell, metric: str) -> dict[int, float]:
    """Return a metric of a cell's runs; those that do not have it are left out."""
    values = {record["seed"]: record["metrics"].get(metric) for record in records if record["cell"] == cell}
    return {seed: value for seed, value in values.items() if value is not None}


def _cells(
    experiment: Experiment, runs: Sequence[Run], records: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield each cell's metrics with their intervals, and the paper's figure."""
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    for cell in _distinct_cells(runs):
        values = {name: list(_by_seed(records, cell, name).values()) for name in names}
        metrics = {name: asdict(interval(found)) for name, found in values.items() if found}
        yield {"cell": cell, "metrics": metrics, "paper": entry(experiment.paper.figures, cell)}


def _comparisons(
    experiment: Experiment, runs: Sequence[Run], records: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the difference between each arm and the baseline, in each cell of the other axes, and its verdict."""
    compare = experiment.compare
    cells = _distinct_cells(runs)
    values = {cell_label(cell): _by_seed(records, cell, compare.metric) for cell in cells}
    baselines = [values[cell_label(cell)] for cell in cells if cell[compare.axis] == compare.baseline]
    learned = compare.learned_at is None or any(
        interval([*found.values()]).mean >= compare.learned_at for found in baselines if found
    )
    for cell in cells:
        if cell[compare.axis] == compare.baseline:
            continue
        baseline = values[cell_label({**cell, compare.axis: compare.baseline})]
        difference = paired_difference(values[cell_label(cell)], baseline)
        effect = entry(compare.effect, cell) if isinstance(compare.effect, dict) else compare.effect
        room = math.inf if compare.ceiling is None or not baseline else abs(compare.ceiling - fmean(baseline.values()))
        judgement, reason = verdict(difference, effect, learned, room)
        yield {
            "cell": cell,
            "difference": difference and asdict(difference),
            "effect": effect,
            "verdict": judgement,
            "reason": reason,
        }


def entry(entries: Mapping[str, T], cell: Cell) -> T | None:
    """Return a cell's entry under the names of its arms, such as `1M, n=2`, or else under fewer of them."""
    arms = list(cell.values())
    for number in range(len(arms), 0, -1):
        for names in itertools.combinations(arms, number):
            if ", ".join(names) in entries:
                return entries[", ".join(names)]
    return None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
