"""Checks of a job before its ranks meet: every rank runs them, and ends with the same message if one fails."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch

from mtp_dist.config import Config, resolve
from mtp_dist.data.run_sources import RunSources
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.launcher import check_launcher_variables, env_rank, env_world_size
from mtp_dist.errors import LaunchError
from mtp_dist.monitoring.logs import configure_logging
from mtp_dist.monitoring.profiling import check_profile
from mtp_dist.monitoring.writers.wandb import check_wandb
from mtp_dist.verify.memory import check_memory


class CheckedJob(NamedTuple):
    """A job that has passed its checks."""

    config: Config
    """The resolved configuration."""
    sources: RunSources
    """The tokenizer and, if the job needs data, opened sources."""
    device: torch.device
    """The selected device of this rank."""


def check_startup(
    config: Config, needs_data: bool = True, memory_snapshot: bool = False, log_level: int = logging.INFO
) -> CheckedJob:
    """Check the launcher, sources, folders and device before any process group opens. Raise UserError if one is wrong.

    Select the device, so that DeepSpeed and Megatron-core may be imported afterwards.
    """
    check_launcher_variables()
    rank, world_size = env_rank(), env_world_size()
    configure_logging(rank, log_level)
    sources = RunSources(config)
    config = resolve(config, sources.tokenizer.vocab_size, world_size)
    if needs_data:
        sources.open_all()
        check_writable("run.output_dir", config.output_dir)
        check_writable("checkpoint.directory", config.checkpoint_dir)
        if config.log.wandb and rank == 0:
            check_wandb(config)
    device = select_device(config)
    if needs_data:  # a self-check or benchmark computes less than the configured model
        config = check_memory(config, device)
    check_profile(config, world_size, memory_snapshot, device)
    if config.deepspeed:
        # DeepSpeed probes the device when it is imported.
        from mtp_dist.engine.deepspeed_keys import check_deepspeed_section

        check_deepspeed_section(config.deepspeed)
    return CheckedJob(config, sources, device)


def check_writable(key: str, folder: Path) -> None:
    """Raise LaunchError if the folder neither exists nor can be created."""
    folder = folder.absolute()
    try:
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                raise LaunchError(
                    f"{key} = '{folder}' cannot be written: {path} is a link to {path.readlink()}, which does not exist"
                )
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise LaunchError(f"{key} = '{str(folder)[:200]}' cannot be written: {error.strerror}") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise LaunchError(f"{key} = '{folder}' cannot be written: {nearest} is not a folder that you may write in")
