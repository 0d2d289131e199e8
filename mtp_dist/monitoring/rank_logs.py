"""A log file per rank with everything that it prints, in addition to the terminal."""

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
"""Folder in `logs/` for the files of an earlier run, until rank 0 archives all of that run."""
SIGNALS_BLOCKED_IN_TEE = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
"""Launchers and SLURM signal every process of a job; without its tee process a rank could not print while it saves."""
TEE_EXIT_TIMEOUT_S = 5.0


def tee_output(output_dir: Path, rank: int, world_size: int, is_new: bool) -> None:
    """Copy what this process and its children write to file descriptors 1 and 2 into this rank's log file.

    Processes of their own copy it, so that nothing is lost if this one is killed. is_new: the run does not resume from
    a checkpoint in output_dir, so the log file of an earlier run is moved.
    """
    folder = output_dir / LOGS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(rank)
    if is_new:
        _move_earlier_files(folder, rank, world_size)
    with path.open("a", encoding="utf-8") as file:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"--- {now}: rank {rank} of {world_size} starts on {platform.node()}, process {os.getpid()}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    copies = [_copy(descriptor, path) for descriptor in (1, 2)]
    atexit.register(_finish, copies)  # runs after Python has printed the traceback of an uncaught error


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.log"


def _move_earlier_files(folder: Path, rank: int, world_size: int) -> None:
    """Move this rank's file of an earlier run; on rank 0 also those of ranks that this run does not have."""
    expected = {_name(other) for other in range(world_size)}
    gone = [path for path in folder.glob(_name(0).replace("0", "?")) if path.name not in expected]
    for path in [folder / _name(rank), *(gone if rank == 0 else [])]:
        moved = folder / EARLIER / path.name
        # If there is one already, the last start ended before rank 0 archived that run: its log is continued.
        if path.exists() and not moved.exists():
            moved.parent.mkdir(exist_ok=True)
            path.rename(moved)


def _copy(descriptor: int, path: Path) -> tuple[int, int, subprocess.Popen[bytes]]:
    """Return the descriptor, a duplicate of its previous target, and the process that reads it from now on."""
    before = os.dup(descriptor)
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_BLOCKED_IN_TEE)  # children inherit it
    try:
        tee = subprocess.Popen(
            ["tee", "-a", path],
            stdin=subprocess.PIPE,
            stdout=before,
            start_new_session=True,
            # SIGPIPE stays ignored, as in Python: the file is also written if nobody reads the terminal any more.
            restore_signals=False,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    assert tee.stdin
    os.dup2(tee.stdin.fileno(), descriptor)
    tee.stdin.close()
    return descriptor, before, tee


def _finish(copies: list[tuple[int, int, subprocess.Popen[bytes]]]) -> None:
    """Wait until the tee processes have copied everything, unless a child process can still write to them."""
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, before, _ in copies:
        os.dup2(before, descriptor)
    for _, _, tee in copies:
        try:
            tee.wait(TEE_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
