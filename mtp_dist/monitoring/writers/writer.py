"""Interface of the places that metrics are written to."""

from collections.abc import Mapping
from typing import Any

from mtp_dist.monitoring.scalars import Scalars


class MetricsWriter:
    """A place for scalars; a subclass overrides what it can show. It may raise OSError, which training survives."""

    name = ""
    """Name in messages."""

    def describe(self, description: Mapping[str, Any]) -> None:
        """Write the contents of `run.json`. Called once, before the first step."""

    def advance(self, step: int) -> None:
        """Update what is shown per step. Called after each step, before `write` if the step is logged."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Write the scalars of a logged step or of a validation."""

    def note(self, text: str) -> None:
        """Write the text of an event. Another thread may call it."""

    def rewind(self, completed_steps: int) -> None:
        """Drop what was written of steps after `completed_steps`: they are repeated."""

    def close(self, failed: bool) -> None:
        """Finish. Called once, after the last write; failed: the run did not end as configured or by a signal."""
