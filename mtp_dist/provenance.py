"""Where and when a measurement was made, for the files that the docs are generated from."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Return the machine, the time and the commit of a measurement as JSON."""
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "torch": version("torch"),
        "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": checkout_commit(),
    }


def checkout_commit() -> str | None:
    """Return the commit of the checkout that this package is imported from, such as `9c0a465d1e2f`.

    It ends in `+changes` if tracked files differ from the commit. None without git, or if the package is installed
    elsewhere, also within another repository.
    """
    this = Path(__file__)
    is_tracked = ["ls-files", "--error-unmatch", this.name]
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:
        for command in (is_tracked, describe):
            output = subprocess.check_output(["git", *command], cwd=this.parent, stderr=subprocess.DEVNULL, text=True)
        return output.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def usable_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def processor_name() -> str:
    """Return the name of the CPU."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
