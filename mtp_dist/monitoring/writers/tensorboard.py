"""TensorBoard event files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mtp_dist.monitoring.scalars import Scalars, validation_prefix
from mtp_dist.monitoring.writers.writer import MetricsWriter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter(MetricsWriter):
    """TensorBoard's event files of a run; the "Custom Scalars" page shows the curves of all heads in one chart."""

    name = "TensorBoard's file"

    def __init__(self, directory: Path, validation_sets: Sequence[str | None], completed_steps: int = 0) -> None:
        """Hide what was written of steps after `completed_steps`: they are repeated."""
        metrics = ["loss", "accuracy", "train/grad_norm"]
        for name in validation_sets:
            metrics += [f"{validation_prefix(name)}/{metric}" for metric in ("loss", "bits_per_byte", "accuracy")]
        charts = {f"{metric} of all heads": ["Multiline", [rf"^{metric}/head_\d+$"]] for metric in metrics}
        for prefix in map(validation_prefix, validation_sets):
            scalar = rf"^{prefix}/draft_acceptance_rate_pos_\d+$"
            charts[f"{prefix}: drafts accepted up to each distance"] = ["Multiline", [scalar]]
        self._layout = {"Prediction heads": charts}
        self._directory = directory
        self._step = completed_steps
        self._writer: SummaryWriter | None = self._open()

    def describe(self, description: Mapping[str, Any]) -> None:
        self._add_text("configuration", _as_yaml(description["config"]))
        self._add_text("run", _as_yaml({name: value for name, value in description.items() if name != "config"}))

    def advance(self, step: int) -> None:
        self._step = step

    def write(self, step: int, scalars: Scalars) -> None:
        self._writer = self._writer or self._open()  # None if a rollback could not open it
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that the curves are live

    def note(self, text: str) -> None:
        self._add_text("note", text)

    def rewind(self, completed_steps: int) -> None:
        self.close(failed=False)
        self._step = completed_steps
        self._writer = self._open()

    def close(self, failed: bool) -> None:
        writer, self._writer = self._writer, None
        if writer:
            writer.close()

    def _open(self) -> "SummaryWriter":
        # Imported here because it takes seconds, which the other ranks and runs without TensorBoard need not wait.
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(self._directory, purge_step=self._step + 1)
        writer.add_custom_scalars(self._layout)
        return writer

    def _add_text(self, tag: str, text: str) -> None:
        if self._writer:  # a closed one would open another file
            self._writer.add_text(tag, text, self._step)


def _as_yaml(values: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(values, sort_keys=False)}```"
