"""`events.jsonl`: what happened to a run beside its steps, over all its starts."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

Kind = Literal["start", "checkpoint", "skip", "spike", "rollback", "stop", "note"]


class EventLog:
    """One JSON object a line: `time` (UTC), `step`, the last one made, `kind` and `text`. For rank 0 only."""

    def __init__(self, path: Path, step: int) -> None:
        """Lines of earlier starts stay."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.step = step

    def record(self, kind: Kind, text: str) -> None:
        """Threads may call it."""
        event = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": self.step, "kind": kind, "text": text}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
