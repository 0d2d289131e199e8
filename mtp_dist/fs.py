"""File-system operations that leave nothing half-written under a final name after a kill or a power failure."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtp_dist.errors import DataError

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS}
"""Errors of network and FUSE mounts that cannot sync a folder."""


def add_suffix(path: Path, suffix: str) -> Path:
    """Return `PATH.bin` and the like. Dots within the name are kept."""
    return path.with_name(path.name + suffix)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk. Raise OSError if that fails.

    Do nothing for a folder on a mount that cannot sync folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file that is either complete or absent after a crash."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    write_durably(temporary, text)
    temporary.rename(path)


def append_durably(path: Path, text: str) -> None:
    """Append text in one write, so that a kill leaves at most its last line incomplete."""
    with path.open("ab", buffering=0) as output:
        output.write(text.encode())
        os.fsync(output.fileno())


@contextmanager
def explain_os_errors(path: Path, action: str) -> Iterator[None]:
    """Turn OSError into a DataError that names the file: the error's own, or else `path`."""
    try:
        yield
    except OSError as error:
        file = error.filename or path
        raise DataError(
            f"cannot {action} {file} ({error.strerror or error}): fix that, then repeat the command"
        ) from None
