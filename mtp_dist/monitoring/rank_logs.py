"""A file for each rank with all that it writes, beside what the terminal shows."""

import atexit
import os
import platform
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

LOGS = "logs"
LOG_FILES = ("rank_*.log",)
EARLIER = "earlier"
"""Folder in `logs/` for the files of an earlier run, until rank 0 sets all of that run aside."""
NOT_FOR_COPIERS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
"""Launchers and SLURM signal every process of a job; a copier that ended then would break the save that follows."""
SECONDS_TO_END = 5.0


def tee_output(output_dir: Path, anew: bool) -> None:
    """From now on copy what this process and its children write to file descriptors 1 and 2 into this rank's file.

    The copying is done by processes of their own, so that nothing is lost where this one is killed. anew: the run does
    not go on from a checkpoint in output_dir; the file of an earlier run is moved then.
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = output_dir / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(rank)
    if anew:
        _move_earlier_files(folder, rank, ranks)
    with path.open("a", encoding="utf-8") as file:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"--- {now}: rank {rank} of {ranks} starts on {platform.node()}, process {os.getpid()}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    copies = [_copy(descriptor, path) for descriptor in (1, 2)]
    # Not earlier: Python prints the traceback of an error that nobody caught just before.
    atexit.register(_end, copies)


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.log"


def _move_earlier_files(folder: Path, rank: int, ranks: int) -> None:
    """Each rank moves its own, as it knows when it opens the next; rank 0 also those of ranks that are no more."""
    expected = {_name(other) for other in range(ranks)}
    gone = [path for path in folder.glob(_name(0).replace("0", "?")) if path.name not in expected]
    for path in [folder / _name(rank), *(gone if rank == 0 else [])]:
        moved = folder / EARLIER / path.name
        # Where there is one already, the last start ended before rank 0 had set that run aside: its log goes on.
        if path.exists() and not moved.exists():
            moved.parent.mkdir(exist_ok=True)
            path.rename(moved)


def _copy(descriptor: int, path: Path) -> tuple[int, int, subprocess.Popen[bytes]]:
    """The descriptor, one of what it led to before, and the process that now reads it."""
    before = os.dup(descriptor)
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_COPIERS)  # which children inherit
    try:
        tee = subprocess.Popen(
            ["tee", "-a", path],
            stdin=subprocess.PIPE,
            stdout=before,
            start_new_session=True,
            # SIGPIPE stays ignored, as in Python: the file is written also if the terminal has no reader any more.
            restore_signals=False,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    assert tee.stdin
    os.dup2(tee.stdin.fileno(), descriptor)
    tee.stdin.close()
    return descriptor, before, tee


def _end(copies: list[tuple[int, int, subprocess.Popen[bytes]]]) -> None:
    """Let the copiers reach their end, unless a child that lives on can still write to them."""
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, before, _ in copies:
        os.dup2(before, descriptor)
    for _, _, tee in copies:
        try:
            tee.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            continue


def earlier_logs(logs: Path, copied: bool) -> Path:
    """Return the folder that has the logs of an earlier run.

    copied: this run copies its output too, so that `logs/` is its own by now.
    """
    return logs / EARLIER if copied else logs
