"""What a run has left in its folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_dist.config import ConfigError

Curve = list[tuple[int, float]]
"""(step, value)."""


@dataclass(frozen=True)
class RunFiles:
    name: str
    folder: Path
    metrics: Sequence[dict[str, Any]]
    """Lines of `metrics.jsonl`."""
    events: Sequence[dict[str, Any]]
    """Lines of `events.jsonl`; none of a run before there were any."""
    description: dict[str, Any]
    """`run.json`: configuration, layout, device, parameters, versions."""

    def curve(self, scalar: str) -> Curve:
        """Without values that were not finite."""
        return [(line["step"], line[scalar]) for line in self.metrics if line.get(scalar) is not None]

    def scalars(self, prefix: str) -> list[str]:
        """Names of scalars that begin so and end with a head's number, in the order of the heads."""
        found = {name for line in self.metrics for name in line if name.startswith(f"{prefix}/head_")}
        return sorted(found, key=lambda name: int(name.rpartition("_")[2]))

    def validation_prefixes(self) -> list[str]:
        """Such as `validation` or `validation/code`."""
        names = dict.fromkeys(name for line in self.metrics for name in line)
        ending = "/loss/total"
        return [name.removesuffix(ending) for name in names if name.startswith("validation") and name.endswith(ending)]

    @property
    def restarts(self) -> list[int]:
        """The steps after which it went on."""
        return [event["step"] for event in self.events if event["kind"] == "start" and event["step"]]


def read_run(folder: Path) -> RunFiles:
    """Raises ConfigError where the folder has no run, or a damaged one."""
    if not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"RUN '{folder}' has no metrics.jsonl: give a run's folder, such as runs/demo")
    metrics = _lines(folder / "metrics.jsonl")
    if not metrics:
        raise ConfigError(f"RUN '{folder}' has no step in its metrics.jsonl yet: wait for the first one")
    description = folder / "run.json"
    try:
        values = json.loads(description.read_text(encoding="utf-8")) if description.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{description} is not JSON ({error}): remove it to report without it") from None
    name = values.get("config", {}).get("run", {}).get("name", folder.name)
    return RunFiles(name, folder, metrics, _lines(folder / "events.jsonl"), values)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines: a run that goes on may be writing the last one."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ConfigError(f"{path} has a line that is not JSON ({error})") from None
