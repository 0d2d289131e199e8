"""Programs without the time of their imports: forked from one process that has imported the packages.

The imports of a rank take ten seconds, and most of the tests' trainings one. Tests of how a program starts (a launcher,
a command's first output) start it for real, and so does `test_launchers.py` the common layouts, because anything that
depends on the order of a set cannot differ between forked ranks.
"""

import atexit
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

PEER_GRACE_S = 1
"""Time that the other ranks get after one has failed, as under a launcher."""
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Program:
    """`python SCRIPT ...` or `python -m MODULE ...` on one or several ranks."""

    arguments: tuple[str, ...]
    processes: int = 1
    port: int = 0
    """Port of the rendezvous."""


@dataclass(frozen=True)
class _Task:
    program: Program
    folder: Path
    environment: dict[str, str]
    streams: Sequence[Path]


def _serve(connection: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    from mtp_dist.monitoring.output import silence_import_warnings

    silence_import_warnings()
    importlib.import_module("mtp_dist.run")
    with suppress(EOFError):  # the tests have ended
        while True:
            task = connection.recv()
            ranks = [FORK.Process(target=_be_rank, args=(rank, task)) for rank in range(task.program.processes)]
            for process in ranks:
                process.start()
            connection.send([process.pid for process in ranks])
            connection.send(_status(ranks))


def _status(ranks: Sequence[BaseProcess]) -> int:
    """Return 0 once all ranks have ended, or the exit code of the first that failed, which ends the others."""
    running = list(ranks)
    while running:
        wait([process.sentinel for process in running])
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode:
                for other in running:
                    other.join(PEER_GRACE_S)
                    other.kill()
                    other.join()
                return process.exitcode
    return 0


def _be_rank(rank: int, task: _Task) -> None:
    os.chdir(task.folder)
    os.environ.clear()
    os.environ.update(task.environment)
    if task.program.processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(task.program.processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(task.program.port))
    for number, path in enumerate(task.streams, 1):
        with path.open("a") as stream:
            os.dup2(stream.fileno(), number)
    program, *arguments = task.program.arguments
    if program == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


class _Server:
    """The process with the imports, one per test process. It runs one program at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()
        self.is_busy = False
        atexit.register(self.connection.close)  # which ends it


_servers: list[_Server] = []


class Forked:
    """A running program, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, program: Program, folder: Path, environment: dict[str, str], streams: Sequence[Path]) -> None:
        if not _servers:
            _servers.append(_Server())
        self._server = _servers[0]
        assert not self._server.is_busy, "another program runs"
        self._server.is_busy = True
        self._server.connection.send(_Task(program, folder, environment, streams))
        self.server_pid = self._server.process.pid
        self.pids: list[int] = self._server.connection.recv()
        """PIDs by rank."""
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._server.connection.poll():
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._server.connection.poll(timeout):
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)
            self.returncode = self._server.connection.recv()
            self._server.is_busy = False
        return self.returncode
