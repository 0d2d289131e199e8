"""`events.jsonl`: what happens to a run besides its steps, in all attempts."""

import errno
import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from signal import Signals

from mtp_dist.errors import LaunchError
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback

logger = logging.getLogger(__name__)

EVENTS = "events.jsonl"
MAX_RESTARTS_WITHOUT_CHECKPOINT = 3


class EventRecorder(Callback, logging.Handler):
    """Callback that logs skips, spikes and stops as events, and handler that appends every event to `events.jsonl`.

    For rank 0 only. An event is a log record with `extra={"event": kind}`. Its line is a JSON object with `time` (UTC),
    `step` (the last completed one), `kind` and `text`; in a SLURM job also with the job's id and its number of
    restarts. Kinds: start, checkpoint, skip, spike, rollback, stop, note.
    """

    def __init__(self, path: Path, completed_steps: int, total_steps: int, show: Callable[[str], None]) -> None:
        """Keep the lines of earlier attempts but an incomplete last one. show: called with the text of each event."""
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._path = path
        self._step = completed_steps
        self._total_steps = total_steps
        self._show = show
        self._is_faulty = False

    def on_step(self, metrics: StepMetrics) -> None:
        self._step = metrics.step
        if metrics.skipped:
            logger.info("step %d changed no parameter: %s", metrics.step, metrics.skipped, extra={"event": "skip"})

    def on_spike(self, step: int, text: str) -> None:
        logger.info("step %d is a spike: %s", step, text, extra={"event": "spike"})

    def on_rollback(self, completed_steps: int) -> None:
        self._step = completed_steps

    def on_stop(self, step: int, signal: int) -> None:
        logger.info(
            "%s: stopping after step %d of %d with a checkpoint; the same command resumes the run",
            Signals(signal).name,
            step,
            self._total_steps,
            extra={"event": "stop"},
        )

    def emit(self, record: logging.LogRecord) -> None:
        if (kind := getattr(record, "event", None)) is None:
            return
        time = datetime.now(UTC).isoformat(timespec="seconds")
        event = {"time": time, "step": self._step, "kind": kind, "text": record.getMessage()}
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
                logger.warning("%s cannot be written, training continues: %s", self._path, error.strerror)
        self._show(record.getMessage())


def check_progress(path: Path) -> None:
    """Raise LaunchError if SLURM has restarted this job several times in a row without a new checkpoint."""
    start = _slurm_start()
    restarts = start.get("slurm_restarts", 0)
    if restarts > MAX_RESTARTS_WITHOUT_CHECKPOINT:
        restarts -= _restarts_at_last_checkpoint(path, start["slurm_job"])
    if restarts > MAX_RESTARTS_WITHOUT_CHECKPOINT:
        raise LaunchError(
            f"SLURM has restarted job {start['slurm_job']} {restarts} times since its last checkpoint: find the "
            "reason in its log (a --time shorter than the start, a failing node), then submit it again"
        )


def _slurm_start() -> dict[str, int]:
    """Return the id of the SLURM job and its number of restarts; nothing outside of SLURM."""
    job, restarts = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return {"slurm_job": int(job), "slurm_restarts": int(restarts)} if job.isdecimal() and restarts.isdecimal() else {}


def _restarts_at_last_checkpoint(path: Path, job: int) -> int:
    """Return the number of restarts of the job at its last checkpoint, 0 if it has none."""
    restarts = 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
            if event["kind"] == "checkpoint" and event["slurm_job"] == job:
                restarts = int(event["slurm_restarts"])
        except (ValueError, KeyError, TypeError):  # incomplete after a node's failure, or written outside of SLURM
            continue
    return restarts
