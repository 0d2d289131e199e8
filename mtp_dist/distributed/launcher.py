"""Environment variables in which a launcher numbers the ranks."""

import os

from mtp_dist.errors import LaunchError

LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Number of ranks on this machine, in the variables of torchrun and of DeepSpeed's launcher."""


def env_rank() -> int:
    """Return this process's rank; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


def env_world_size() -> int:
    """Return the number of ranks; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_ranks() -> int | None:
    """Return the number of ranks on this machine; None if no launcher has set it."""
    return next((int(os.environ[name]) for name in LOCAL_SIZES if os.environ.get(name)), None)


def check_launcher_variables() -> None:
    """Raise LaunchError if a variable that numbers the ranks is set to anything but a number."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", *LOCAL_SIZES):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise LaunchError(
                f"{name} = {value!r} in the environment is not a number: unset it to start one process, or let a "
                "launcher such as torchrun set RANK, LOCAL_RANK and WORLD_SIZE"
            )
