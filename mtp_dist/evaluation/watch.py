"""Evaluation of each checkpoint of a run while it trains, from another process or another allocation.

Results go to `evaluations.jsonl` in the run's folder, and as scalars `eval/<task>/<metric>` to its TensorBoard folder.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.find import finished_checkpoints
from mtp_dist.checkpoint.format import MANIFEST
from mtp_dist.errors import CheckpointError, DataError
from mtp_dist.fs import explain_os_errors

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations.jsonl"
TENSORBOARD_FOLDER = "evaluation"
"""A folder in the run's own: of several event files in one folder, TensorBoard may follow the newest one only."""
POLL_SECONDS = 10.0
LOCK = "run.lock"
"""A file in the run's folder that exists while the run trains, with a number that it increases every 10 seconds."""
ENDED_AFTER_S = 900.0
"""Time without a change of the lock after which the training counts as ended: a restart takes less."""

Metrics = dict[str, float]
"""Values by `<task>/<metric>`."""


@dataclass(frozen=True)
class Evaluation:
    """The result of one checkpoint."""

    step: int
    metrics: Metrics


def watch(
    run: Path,
    label: str,
    evaluate: Callable[[Path], Metrics],
    once: bool = False,
    poll_seconds: float = POLL_SECONDS,
) -> Iterator[Evaluation]:
    """Evaluate each checkpoint of a run, by step, and yield its result after it has been written, until the run ends.

    label: the evaluation and its settings; a checkpoint with a line of this label is not evaluated again. once: end
    after the checkpoints that exist. Raise DataError if the folder does not contain a run, or if its training has ended
    before its last step, and what `evaluate` raises, but for checkpoints that are corrupt or deleted meanwhile: these
    are skipped with a warning.
    """
    if not (run / "run.json").exists():
        raise DataError(
            f"--watch = '{run}' has no run.json: give the folder of a run that has started, such as runs/demo"
        )
    if (directory := _checkpoint_dir(run)) != run / "checkpoints" and not directory.is_dir():
        logger.warning("%s does not exist yet; a relative path begins where the training was started", directory)
    seen = _evaluated(run, label)
    lock, last_change = _lock(run), time.monotonic()
    while True:
        is_last_pass = once or _has_finished(run)
        for step, folder in reversed(finished_checkpoints(_checkpoint_dir(run)).items()):
            checkpoint = step, _fingerprint(folder)
            if checkpoint in seen:
                continue
            seen.add(checkpoint)
            if (metrics := _evaluate(folder, evaluate)) is not None:
                with explain_os_errors(run / EVALUATIONS, "write"):
                    _write(run, checkpoint, label, metrics)
                yield Evaluation(step, metrics)
            last_change = time.monotonic()  # meanwhile the training may have ended and started again
        if is_last_pass:
            return
        if (now := _lock(run)) != lock:
            lock, last_change = now, time.monotonic()
        elif time.monotonic() - last_change > ENDED_AFTER_S:
            raise DataError(
                f"--watch = '{run}': its training has not run for {ENDED_AFTER_S / 60:g} minutes and has not reached "
                "its last step. All its checkpoints are evaluated; repeat this command when the training is resumed"
            )
        time.sleep(poll_seconds)


def _lock(run: Path) -> bytes:
    """Return the content of the run's lock; empty if the run does not train."""
    try:
        return (run / LOCK).read_bytes()
    except OSError:
        return b""


def _evaluate(folder: Path, evaluate: Callable[[Path], Metrics]) -> Metrics | None:
    """Return the result of a checkpoint; None if it is corrupt or has been deleted."""
    try:
        return evaluate(folder)
    except Exception as error:  # whatever was reading a file when it was deleted reports that in its own way
        if not folder.exists():
            logger.warning("%s was deleted before it was evaluated: skipped", folder)
        elif isinstance(error, CheckpointError):
            logger.warning("skipped: %s", error)
        else:
            raise
        return None


def _fingerprint(folder: Path) -> str:
    """Return a hash that differs from those of later checkpoints of the same step; empty if it is deleted."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _evaluated(run: Path, label: str) -> set[tuple[int, str]]:
    """Return step and fingerprint of the checkpoints that have been evaluated."""
    path, found = run / EVALUATIONS, set()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            if record["evaluation"] == label:
                found.add((record["step"], record["checkpoint"]))
        except (ValueError, KeyError, TypeError):  # incomplete after a kill
            continue
    return found


def _has_finished(run: Path) -> bool:
    """Return whether the run has reached `train.steps`, which a resume may have raised since the last summary."""
    summary, config = _read(run / "summary.json"), _config(run)
    return bool(summary and config and summary["steps"] >= config["train"]["steps"])


def _checkpoint_dir(run: Path) -> Path:
    given = _config(run).get("checkpoint", {}).get("directory")
    return Path(given) if given else run / "checkpoints"


def _config(run: Path) -> dict[str, Any]:
    return _read(run / "run.json").get("config", {})


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no file, as while a new run archives those of another."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): restore it, or give --watch another run") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} does not contain a JSON object: give --watch the folder of a run")
    return content


def _write(run: Path, checkpoint: tuple[int, str], label: str, metrics: Metrics) -> None:
    """Write the result of a checkpoint to TensorBoard, if the run has it, and then as a line, after which it counts."""
    step, fingerprint = checkpoint
    if _config(run).get("log", {}).get("tensorboard", True):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        with SummaryWriter(run / "tensorboard" / TENSORBOARD_FOLDER) as writer:
            for name, value in metrics.items():
                writer.add_scalar(f"eval/{name}", value, step)
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "checkpoint": fingerprint,
        "evaluation": label,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
    }
    with (run / EVALUATIONS).open("ab+", buffering=0) as file:
        incomplete = file.seek(0, 2) and file.seek(-1, 2) is not None and file.read() != b"\n"
        file.write(b"\n" * incomplete + json.dumps(record).encode() + b"\n")
