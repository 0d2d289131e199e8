"""Programs without the time of their imports: forked from one process that has imported the packages.

The imports of a rank take ten seconds, and most of the tests' trainings one. Tests of how a program starts (a launcher,
a command's first output) start it for real, and so does `test_launchers.py` the common layouts, because anything that
depends on the order of a set cannot differ between forked ranks.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait

PEER_GRACE_S = 1
"""Time that the other ranks get after one has failed, as under a launcher."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.integration.preload"])


@dataclass(frozen=True)
class Program:
    """`python SCRIPT ...` or `python -m MODULE ...` on one or several ranks."""

    arguments: tuple[str, ...]
    processes: int = 1
    port: int = 0
    """Port of the rendezvous."""


def _be_rank(rank, program, folder, environment, streams):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if program.processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(program.processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(program.port))
    for number, path in enumerate(streams, 1):
        with path.open("a") as stream:
            os.dup2(stream.fileno(), number)
    script, *arguments = program.arguments
    if script == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")


class Forked:
    """A running program, with the part of subprocess.Popen's interface that the tests use."""

    def __init__(self, program, folder, environment, streams):
        given = (program, folder, environment, streams)
        self._ranks = [CONTEXT.Process(target=_be_rank, args=(rank, *given)) for rank in range(program.processes)]
        for process in self._ranks:
            process.start()
        self.pids = [process.pid for process in self._ranks]
        """PIDs by rank."""
        self.returncode = None

    def poll(self):
        """Return 0 once all ranks have ended, or the exit code of one that failed, which ends the others."""
        running = [process for process in self._ranks if process.exitcode is None]
        failed = [process.exitcode for process in self._ranks if process.exitcode]
        for process in running if failed else ():
            process.join(PEER_GRACE_S)
            process.kill()
            process.join()
        if self.returncode is None and (failed or not running):
            self.returncode = failed[0] if failed else 0
        return self.returncode

    def wait(self, timeout=float("inf")):
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            running = [process.sentinel for process in self._ranks if process.exitcode is None]
            if not wait(running, min(deadline - time.monotonic(), 1)) and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked program", timeout)
        return status
