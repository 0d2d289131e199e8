"""Writing so that a kill or a power failure leaves nothing half-done under a final name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtp_dist.data.indexed import add_suffix
from mtp_dist.errors import ConfigError
from mtp_dist.fs import write_durably


@contextmanager
def explain_os_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system says into a sentence about the file, `path` where it names none."""
    try:
        yield
    except OSError as error:
        named = error.filename or path
        raise ConfigError(
            f"cannot {doing} {named} ({error.strerror or error}): once it can, the same command goes on from what is "
            "done"
        ) from None


def atomic_write_text(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = add_suffix(file, f".{os.getpid()}")
    write_durably(temporary, text)
    temporary.rename(file)
