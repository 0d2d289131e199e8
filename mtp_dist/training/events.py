"""`events.jsonl`: what happened to a run beside its steps, over all its starts."""

import errno
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mtp_dist.training.callbacks import warn

Kind = Literal["start", "checkpoint", "skip", "spike", "rollback", "stop", "note"]


class EventLog:
    """One JSON object a line: `time` (UTC), `step`, the last one made, `kind` and `text`. For rank 0 only."""

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
        line = json.dumps(event).encode() + b"\n"
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
