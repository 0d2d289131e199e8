"""TensorBoard and Weights & Biases: the scalars of a run where people look at them."""

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mtp_dist.config import Config
from mtp_dist.errors import ConfigError
from mtp_dist.monitoring.callbacks import MetricsWriter, Scalars, validation_prefix

logger = logging.getLogger(__name__)

WANDB_FOLDER = "wandb"
"""What W&B calls its folder itself."""
RUN_ID = "run_id"
"""Our file in it, with the id that this run has on W&B."""
WANDB_FINISH_SECONDS = 60.0
"""Time for the upload of what is left at the end of a run; it stays on the disk in any case."""


class TensorBoardWriter(MetricsWriter):
    """TensorBoard event files; its "Custom Scalars" page shows the curves of all heads in one chart."""

    name = "TensorBoard's file"

    def __init__(self, directory: Path, validation_sets: Sequence[str | None], completed_steps: int = 0) -> None:
        """What was written of steps after `completed_steps` is hidden: they will be made again."""
        # Imported here because it takes seconds, which the other ranks and runs without TensorBoard need not wait.
        from torch.utils.tensorboard import SummaryWriter

        self._step = completed_steps
        self._writer = SummaryWriter(directory, purge_step=completed_steps + 1 if completed_steps else None)
        self._is_closed = False
        kinds = ["loss", "accuracy", "train/grad_norm"]
        for name in validation_sets:
            kinds += [f"{validation_prefix(name)}/{kind}" for kind in ("loss", "bits_per_byte", "accuracy")]
        charts = {f"{kind} of all heads": ["Multiline", [rf"^{kind}/head_\d+$"]] for kind in kinds}
        self._writer.add_custom_scalars({"Prediction heads": charts})

    def describe(self, description: Mapping[str, Any]) -> None:
        rest = {name: value for name, value in description.items() if name != "config"}
        for name, values in (("configuration", description["config"]), ("run", rest)):
            text = yaml.safe_dump(values, sort_keys=False)
            self._writer.add_text(name, f"```yaml\n{text}```", self._step)

    def advance(self, step: int) -> None:
        self._step = step

    def write(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that the curves are live

    def note(self, text: str) -> None:
        if not self._is_closed:  # it would open another file
            self._writer.add_text("note", text, self._step)

    def close(self, failed: bool) -> None:
        self._is_closed = True
        self._writer.close()


def check_wandb(config: Config) -> None:
    """Raises ConfigError where `log.wandb` asks for what this machine lacks. For rank 0, which alone writes there."""
    try:
        version("wandb")  # an import would be content with any folder called wandb
    except PackageNotFoundError:
        raise ConfigError(
            f"log.wandb = '{config.log.wandb}' needs the package wandb, which is not installed: "
            "pip install wandb, or remove log.wandb"
        ) from None
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise ConfigError(
            f"log.wandb = '{config.log.wandb}' cannot log in to Weights & Biases: {error} "
            "Set WANDB_MODE=offline to keep the data on the disk"
        ) from None


def wandb_files(folder: Path) -> tuple[str, ...]:
    """Return patterns of what belongs to the run whose id is in the folder; W&B ends its folders' names with the id."""
    try:
        return RUN_ID, f"*run-*-{escape((folder / RUN_ID).read_text(encoding='utf-8'))}"
    except FileNotFoundError:
        return ()


class WandbWriter(MetricsWriter):
    """A run on Weights & Biases, the same one over all starts of the run in `output_dir`."""

    def __init__(self, project: str, name: str, output_dir: Path) -> None:
        """Where the service cannot be reached, the data stays on the disk: training does not depend on it."""
        import wandb

        id_file = output_dir / WANDB_FOLDER / RUN_ID
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
        arguments: dict[str, Any] = {
            "project": project,
            "name": name,
            "id": id_file.read_text(encoding="utf-8"),
            "resume": "allow",
            "dir": output_dir,
            "settings": wandb.Settings(finish_timeout=WANDB_FINISH_SECONDS),
        }
        self._run: Any = None
        try:
            self._run = wandb.init(**arguments)
        except wandb.Error as error:
            logger.warning("Weights & Biases writes to the disk only: %s", error)
            wandb.teardown()  # its service holds the run's id since the attempt
            self._run = wandb.init(**arguments, mode="offline")
        # Steps that are made again after a restart go back, which the service's own count of steps cannot.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def describe(self, description: Mapping[str, Any]) -> None:
        rest = {name: value for name, value in description.items() if name != "config"}
        self._send(lambda run: run.config.update({**description["config"], **rest}, allow_val_change=True))

    def write(self, step: int, scalars: Scalars) -> None:
        present = {name: value for name, value in scalars.items() if value is not None}
        self._send(lambda run: run.log({"step": step, **present}))

    def close(self, failed: bool) -> None:
        self._send(lambda run: run.finish(exit_code=int(failed)))

    def _send(self, action: Callable[[Any], None]) -> None:
        """To a process of its own, which the signal that stops a job may have ended."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # which one depends on what it was doing
            self._run = None
            logger.warning("Weights & Biases gets nothing more, training continues: %s", error)
