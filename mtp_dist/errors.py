"""Errors that a user can fix. Every command prints their message without a traceback and exits with status 2."""

import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

RANK0_REPORT_GRACE_S = 10

P = ParamSpec("P")
T = TypeVar("T")


class UserError(ValueError):
    """An error whose message names the key, file or rank at fault and the remedy."""


class ConfigError(UserError):
    """An invalid configuration, or settings that exclude each other."""


class DataError(UserError):
    """A source, corpus or tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint, or a folder of a foreign model, that cannot be used."""


class LaunchError(UserError):
    """A job that cannot start as it was launched: its ranks, devices, folders or environment."""


class TrainingDivergedError(UserError):
    """A run whose loss or gradients do not recover."""


def exits_with_user_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Decorate a command so that a UserError ends the process as `exit_with_error` does."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            exit_with_error(error)

    return run


def exit_with_error(error: UserError) -> NoReturn:
    """Print the error and end this process with status 2. Errors common to all ranks are printed by rank 0 only."""
    rank, prefix = os.environ.get("RANK", "0"), "error"
    if rank.isdecimal() and int(rank):
        # Launchers kill the other ranks as soon as one has ended, so rank 0 must be the first. A rank that still runs
        # after that has an error of its own, such as a missing GPU.
        time.sleep(RANK0_REPORT_GRACE_S)
        prefix = f"error on rank {rank}"
    print("\n".join(f"{prefix}: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)
    if (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        # A thread that saves may be inside a collective: a regular exit would end in an abort instead of status 2.
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)
