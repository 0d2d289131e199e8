"""`metrics.jsonl`, for programs."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from mtp_dist.fs import atomic_write_text
from mtp_dist.monitoring.scalars import Scalars, json_number
from mtp_dist.monitoring.writers.writer import MetricsWriter


class JsonlWriter(MetricsWriter):
    """A file with one JSON object per line: `step` and the scalars in full precision.

    Lines that a full disk has no room for are written with the next one that it has room for.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, completed_steps: int = 0) -> None:
        """Drop the lines of steps after `completed_steps`: they are repeated."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = self._open(completed_steps)

    def write(self, step: int, scalars: Scalars) -> None:
        record = {"step": step} | {name: json_number(value) for name, value in scalars.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()  # a run that is killed keeps every line

    def rewind(self, completed_steps: int) -> None:
        with suppress(OSError):  # of a full disk, already reported
            self._file.flush()
        replaced, self._file = self._file, self._open(completed_steps)  # if it raises, lines are added to the old file
        with suppress(OSError):
            replaced.close()

    def close(self, failed: bool) -> None:
        self._file.close()

    def _open(self, completed_steps: int) -> TextIO:
        """Rewrite the file without the lines of later steps and open it for more."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [f"{line}\n" for line in lines if _step_of(line) <= completed_steps]
        atomic_write_text(self._path, "".join(kept))
        return self._path.open("a", encoding="utf-8")


def _step_of(line: str) -> float:
    """Return the step of a line; infinity if the run was killed while it wrote the line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
