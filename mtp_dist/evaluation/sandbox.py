"""Execution of untrusted Python programs, which the kernel confines: see sandbox_launcher.py."""

import marshal
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mtp_dist.errors import LaunchError

LAUNCHER = Path(__file__).parent / "sandbox_launcher.py"
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
"""The interpreter of programs, which has the standard library only."""
SYSTEM_PATHS = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store"),
    *("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)
WALL_FACTOR = 3
"""Seconds of wall-clock time per second of processor time: enough on a busy machine, and for a program that sleeps."""

SCRATCH_BYTES = 64 * 2**20


class Outcome(NamedTuple):
    """The result of executing a program."""

    passed: bool
    """True if it reached its end without an exception."""
    reason: str
    """`passed`, the exception, `timed out` or the signal that killed it."""


@dataclass(frozen=True)
class Sandbox:
    """An environment for untrusted programs, and their limits."""

    timeout_s: float = 3.0
    """Processor time, rounded up to whole seconds by the kernel's limit."""
    memory_bytes: int = 2**30
    """Address space of the program, which is one process."""
    is_isolated: bool = True
    """True if namespaces hide files, processes and the network. Otherwise a program may write what the user may."""

    def check(self) -> None:
        """Raise LaunchError if a program cannot be confined on this machine."""
        home = Path(os.path.realpath(os.path.expanduser("~")))
        if self.is_isolated and (inside := [path for path in self._paths() if home.is_relative_to(path)]):
            raise LaunchError(
                f"the sandbox cannot hide the home folder {home}: it is inside {inside[0]}, which the interpreter "
                "needs. Use a Python that is installed elsewhere, or run this as another user"
            )
        outcome = self.run("import math, hashlib, random, re, collections, string")
        if not outcome.passed:
            raise LaunchError(
                f"the sandbox cannot run {PYTHON}: {outcome.reason}. It sees only the system's folders and "
                f"{sys.base_prefix}: use a Python whose libraries are there"
            )

    def run(self, program: str) -> Outcome:
        """Execute a program. Raise LaunchError if it cannot be confined on this machine."""
        token = secrets.token_hex(16)
        wall_seconds = self.timeout_s * WALL_FACTOR
        request = {
            "program": program,
            "token": token,
            "python": PYTHON,
            "isolated": self.is_isolated,
            "paths": self._paths(),
            "scratch_bytes": SCRATCH_BYTES,
            "wall_seconds": wall_seconds,
            "limits": self._limits(),
        }
        with tempfile.TemporaryDirectory(
            prefix="mtp-dist-", ignore_cleanup_errors=True
        ) as folder:  # of a program that is not isolated
            completed = subprocess.run(
                [PYTHON, "-I", "-S", "-B", str(LAUNCHER)],
                input=marshal.dumps(request),
                capture_output=True,
                env={},
                cwd=folder,
                start_new_session=True,
            )
        if completed.returncode:
            raise LaunchError(f"the sandbox failed: {completed.stderr.decode(errors='replace').strip()}")
        return self._outcome(marshal.loads(completed.stdout), token)

    def _limits(self) -> dict[str, int]:
        return {
            "RLIMIT_CPU": math.ceil(self.timeout_s),
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": SCRATCH_BYTES,
            "RLIMIT_NPROC": 16,  # threads, as the system calls that start processes fail
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
            "RLIMIT_MSGQUEUE": 0,
        }

    @staticmethod
    def _paths() -> list[str]:
        prefixes = dict.fromkeys(os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix))
        return [*SYSTEM_PATHS, *prefixes, PYTHON]

    def _outcome(self, result: dict[str, Any], token: str) -> Outcome:
        if problem := result.get("refused"):
            raise LaunchError(
                f"this machine does not permit the sandbox ({problem}): it needs Linux 5.14 or newer on x86_64 or "
                "aarch64 with user namespaces, see docs/evaluation.md. --unsafe-no-sandbox runs the code with your "
                "rights instead: it can then change or delete what you can"
            )
        if result["verdict"] == token:
            return Outcome(True, "passed")
        if result["expired"] or (result["signal"] and result["cpu_seconds"] > math.ceil(self.timeout_s) - 0.5):
            return Outcome(False, "timed out")
        if result["signal"]:
            return Outcome(False, f"killed by signal {result['signal']}")
        reason = "".join(char if char.isprintable() else "?" for char in result["verdict"].replace(token, ""))
        return Outcome(False, reason or "exited")


def run_programs(
    sandbox: Sandbox, programs: Sequence[str], workers: int, on_progress: Callable[[int, int], None]
) -> list[Outcome]:
    """Execute programs in parallel. `on_progress` is called with the number of those that ended, and of all."""
    outcomes: list[Outcome] = []
    pool = ThreadPoolExecutor(workers)
    try:
        for outcome in pool.map(sandbox.run, programs):
            outcomes.append(outcome)
            on_progress(len(outcomes), len(programs))
    finally:
        pool.shutdown(cancel_futures=True)
    return outcomes
