"""The source `python-stdlib`: real source code that every machine with Python has."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from mtp_dist.data.splits import Split, in_validation_split

PYTHON_STDLIB = "python-stdlib"

# Tests are more than half of the standard library, and Debian does not install them; codec tables and pydoc's texts are
# generated. The rest is hand-written code, nearly the same on every machine.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"})


def stdlib_files(split: Split) -> list[Path]:
    """Return the .py files of this Python's standard library, sorted by POSIX relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, Path] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            if file.is_file():
                files[file.relative_to(root).as_posix()] = file
    wanted = {"all": (True, False), "train": (False,), "validation": (True,)}[split]
    return [file for name, file in sorted(files.items()) if in_validation_split(name) in wanted]
