"""Machine, time and commit of a measurement, for the files that the docs are generated from."""

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
        "gpus": gpu_names(),
        "torch": version("torch"),
        "time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": checkout_commit(),
    }


def checkout_commit() -> str | None:
    """Return the commit of the checkout that this package is imported from, such as `9c0a465d1e2f`.

    It ends in `+changes` if tracked files differ from the commit, except those of docs/data: a measurement that is
    redirected to one has emptied it before it starts. None without git, or if the package is installed elsewhere, also
    within another repository.
    """
    this = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=this.parent, stderr=subprocess.DEVNULL, text=True)

    try:
        commit, _ = git("rev-parse", "HEAD", f"HEAD:./{this.name}").split()
        changes = git("status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)docs/data")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit[:12] + ("+changes" if changes else "")


def gpu_names() -> list[str]:
    """Return the names of the GPUs that this process may use."""
    from torch import cuda  # takes seconds to import

    return [cuda.get_device_name(index) for index in range(cuda.device_count())]


def usable_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def processor_name() -> str:
    """Return the name of the CPU."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
