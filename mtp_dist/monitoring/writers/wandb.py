"""Weights & Biases."""

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mtp_dist.config import Config
from mtp_dist.errors import ConfigError, LaunchError
from mtp_dist.monitoring.scalars import Scalars
from mtp_dist.monitoring.writers.writer import MetricsWriter

logger = logging.getLogger(__name__)

WANDB_FOLDER = "wandb"
"""Name of the folder that W&B makes."""
RUN_ID = "run_id"
"""File in that folder that contains the run's id on W&B."""
FINISH_TIMEOUT_S = 60.0
"""Time to upload the rest at the end of a run; the data stays on the disk in any case."""


def check_wandb(config: Config) -> None:
    """Raise a UserError if `log.wandb` needs what this machine does not have. For rank 0, the only one that logs."""
    try:
        version("wandb")  # an import would also find a folder called wandb
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
        raise LaunchError(
            f"log.wandb = '{config.log.wandb}' cannot log in to Weights & Biases: {error} "
            "Set WANDB_MODE=offline to keep the data on the disk"
        ) from None


def wandb_files(folder: Path) -> tuple[str, ...]:
    """Return patterns of the files of the run whose id is in the folder: W&B ends its folders' names with the id."""
    try:
        return RUN_ID, f"*run-*-{escape((folder / RUN_ID).read_text(encoding='utf-8'))}"
    except FileNotFoundError:
        return ()


class WandbWriter(MetricsWriter):
    """A run on Weights & Biases, the same one over all starts of the run in `output_dir`."""

    name = "Weights & Biases"

    def __init__(self, project: str, name: str, output_dir: Path) -> None:
        """Open the run. If the service cannot be reached, write to the disk only."""
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
            "settings": wandb.Settings(finish_timeout=FINISH_TIMEOUT_S),
        }
        try:
            self._run: Any = wandb.init(**arguments)
        except wandb.Error as error:
            logger.warning("Weights & Biases writes to the disk only: %s", error)
            wandb.teardown()  # its service has held the run's id since the attempt
            self._run = wandb.init(**arguments, mode="offline")
        self._is_reachable = True
        # W&B's own count of steps cannot decrease, as `step` does after a restart or a rollback.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def describe(self, description: Mapping[str, Any]) -> None:
        values = description["config"] | {name: value for name, value in description.items() if name != "config"}
        self._call(self._run.config.update, values, allow_val_change=True)

    def write(self, step: int, scalars: Scalars) -> None:
        present = {name: value for name, value in scalars.items() if value is not None}
        self._call(self._run.log, {"step": step, **present})

    def close(self, failed: bool) -> None:
        self._call(self._run.finish, exit_code=int(failed))

    def _call(self, method: Callable[..., object], *arguments: object, **options: object) -> None:
        """Send something to W&B's process, which the signal that stops a job may have ended."""
        if not self._is_reachable:
            return
        try:
            method(*arguments, **options)
        except Exception as error:  # its kind depends on what the process was doing
            self._is_reachable = False
            logger.warning("No longer logging to Weights & Biases, training continues: %s", error)
