"""Having on the disk itself what was written: a name must not outlive a power failure that its content does not."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
