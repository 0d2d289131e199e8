"""Files of a run that a report reads."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_dist.errors import DataError
from mtp_dist.monitoring.events import EVENTS

Curve = list[tuple[int, float]]
"""Pairs of step and value."""


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run's folder."""

    name: str
    folder: Path
    metrics: Sequence[dict[str, Any]]
    """Lines of `metrics.jsonl`."""
    events: Sequence[dict[str, Any]]
    """Lines of `events.jsonl`; empty if there is no such file."""
    description: dict[str, Any]
    """`run.json`: configuration, layout, device, parameters, versions, machine, time and commit."""

    def curve(self, scalar: str) -> Curve:
        """Return the values of a scalar without NaN and Inf."""
        return [(line["step"], line[scalar]) for line in self.metrics if line.get(scalar) is not None]

    def scalars(self, prefix: str) -> list[str]:
        """Return the names `PREFIX_K` of scalars in the order of the numbers K."""
        found = {name for line in self.metrics for name in line if re.fullmatch(rf"{re.escape(prefix)}_\d+", name)}
        return sorted(found, key=lambda name: int(name.rpartition("_")[2]))

    def validation_prefixes(self) -> list[str]:
        """Return the prefixes of validation scalars, such as `validation` or `validation/code`."""
        names = dict.fromkeys(name for line in self.metrics for name in line)
        ending = "/loss/total"
        return [name.removesuffix(ending) for name in names if name.startswith("validation") and name.endswith(ending)]

    @property
    def restarts(self) -> list[int]:
        """Steps after which the run was resumed."""
        return [event["step"] for event in self.events if event["kind"] == "start" and event["step"]]


def read_run(folder: Path) -> RunFiles:
    """Return the run's files. Raise UserError if the folder does not contain a run or a file is damaged."""
    if not (folder / "metrics.jsonl").exists():
        raise DataError(f"RUN '{folder}' has no metrics.jsonl: give a run's folder, such as runs/demo")
    metrics = _lines(folder / "metrics.jsonl", {"step": int})
    if not metrics:
        raise DataError(f"RUN '{folder}' has no step in its metrics.jsonl yet: wait for the first one")
    events = _lines(folder / EVENTS, {"time": str, "step": int, "kind": str, "text": str})
    description = _description(folder / "run.json")
    return RunFiles(_name(description) or folder.name, folder, metrics, events, description)


def _description(path: Path) -> dict[str, Any]:
    """Return the contents of `run.json`; empty if there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(values, dict) or not isinstance(_name(values), str | None):
            raise ValueError("it has no config.run.name")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} does not describe a run ({error}): remove it to report without it") from None
    return values


def _name(description: Any) -> Any:
    return description.get("config", {}).get("run", {}).get("name")


def _lines(path: Path, types: dict[str, type]) -> list[dict[str, Any]]:
    """Return the complete lines; a run that is still training may be writing the last one.

    Raise DataError if one is not a JSON object with values of these types.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}): remove that line") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in types.items()):
            raise DataError(f"{path}, line {number} does not have the keys {', '.join(types)}: remove that line")
        rows.append(row)
    return rows
