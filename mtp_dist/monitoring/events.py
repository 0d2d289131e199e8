"""`events.jsonl`: what happened to a run beside its steps, over all its starts."""

import errno
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mtp_dist.errors import ConfigError
from mtp_dist.monitoring.callbacks import warn

EVENTS = "events.jsonl"
MAX_RESTARTS_WITHOUT_CHECKPOINT = 3

Kind = Literal["start", "checkpoint", "skip", "spike", "rollback", "stop", "note"]


class EventLog:
    """One JSON object per line: `time` (UTC), `step`, the last one made, `kind` and `text`; in a SLURM job its id and
    its number of restarts too. For rank 0 only."""

    def __init__(self, path: Path, step: int) -> None:
        """Lines of earlier starts stay, but for half a one that a node's failure left."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._path = path
        self.step = step
        self._is_faulty = False

    def record(self, kind: Kind, text: str) -> None:
        """Threads may call it. What cannot be written is told once: training goes on."""
        event = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": self.step, "kind": kind, "text": text}
        line = json.dumps(event | _slurm_start()).encode() + b"\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) < len(line):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._is_faulty:
                self._is_faulty = True
                warn(f"{self._path} cannot be written, training goes on: {error.strerror}")


def check_progress(path: Path) -> None:
    """Raise ConfigError if SLURM has restarted this job several times and no start in a row has saved anything."""
    start = _slurm_start()
    restarts = start.get("slurm_restarts", 0)
    if restarts > MAX_RESTARTS_WITHOUT_CHECKPOINT:
        restarts -= _restarts_at_last_checkpoint(path, start["slurm_job"])
    if restarts > MAX_RESTARTS_WITHOUT_CHECKPOINT:
        raise ConfigError(
            f"SLURM has restarted job {start['slurm_job']} {restarts} times since its last checkpoint, and the next "
            "time would be no different: look for the reason in its log (a --time shorter than the start, a node "
            "that fails), then submit it again"
        )


def _slurm_start() -> dict[str, int]:
    """Return the SLURM job and the number of its restarts; nothing outside of SLURM."""
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return {"slurm_job": int(job), "slurm_restarts": int(restarts)} if job.isdecimal() and restarts.isdecimal() else {}


def _restarts_at_last_checkpoint(path: Path, job: int) -> int:
    """Return how often the job had been restarted when it saved last, 0 if it has saved nothing."""
    restarts = 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
            if event["kind"] == "checkpoint" and event["slurm_job"] == job:
                restarts = int(event["slurm_restarts"])
        except (ValueError, KeyError, TypeError):  # cut off by a node's failure, or written outside of SLURM
            continue
    return restarts
