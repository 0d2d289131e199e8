"""Having on the disk itself what was written: a name must not outlive a power failure that its content does not."""

import errno
import os
import stat
from pathlib import Path

REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS}
"""What some network and FUSE mounts answer when a folder is synced: they have no such operation."""


def sync(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk. Raise OSError if it cannot.

    A mount that does not sync folders is tolerated: there is nothing else to do there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in REFUSED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
