"""The environment variables by which a launcher numbers the ranks."""

import os

from mtp_dist.config import ConfigError


def check_launcher_variables() -> None:
    """Raise ConfigError if RANK, LOCAL_RANK or WORLD_SIZE is set to anything but a number."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise ConfigError(
                f"{name} = {value!r} in the environment is not a number: unset it to start one process, or let a "
                "launcher such as torchrun set RANK, LOCAL_RANK and WORLD_SIZE"
            )
