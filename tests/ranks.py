"""Ranks for the tests: processes that are spawned once per session, because importing DeepSpeed takes seconds.

Spawned and not forked from one process: what depends on the order of a set must be able to differ between them.
"""

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from mtp_dist.config import Config
from tests.tiny import at_world_size

TIMEOUT_SECONDS = 600
"""Longest time of one task: some seconds on an idle machine, with the imports a minute and more on a busy one."""
OPEN_TIMEOUT = timedelta(minutes=5)
"""Longest time of opening a process group, most of which is the imports of the slowest rank."""
OPEN_ATTEMPTS = 3
"""On a busy machine gloo sometimes closes a connection while it connects the ranks."""


class RankError(AssertionError):
    """A rank raised an exception; the message is its traceback."""


def _serve(rank: int, connection: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    import torch
    import torch.distributed as dist

    from mtp_dist.monitoring.output import silence_import_warnings

    torch.set_num_threads(1)
    silence_import_warnings()
    import mtp_dist.engine.engine  # noqa: F401

    # None of the packages' half million objects is ever garbage, and scanning them would take a quarter of each task.
    gc.collect()
    gc.freeze()
    while (task := connection.recv()) is not None:
        function, arguments, world_size, store = task
        os.environ["WORLD_SIZE"] = str(world_size)
        try:
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", timeout=OPEN_TIMEOUT, rank=rank, world_size=world_size
                )
                connection.send(None)
            except Exception:
                connection.send(traceback.format_exc())
            if connection.recv():
                connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            _close_groups()


def _close_groups() -> None:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from megatron.core import parallel_state

    # C++ hooks keep every engine and its parameters alive, and with them their process groups, each of which has
    # threads that wake up all the time: empty them explicitly.
    for thing in gc.get_objects():
        if type(thing) in (PipelineEngine, DualPipeVEngine):
            thing.optimizer.__dict__.clear()
            for parameter in thing.module.parameters():
                parameter.__dict__.clear()
            for module in list(thing.module.modules()):
                module.__dict__.clear()
            thing.grid.__dict__.clear()
            thing.__dict__.clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.distributed_c10d._world.group_count = 0  # a failed attempt counts on some ranks only, and names differ
    deepspeed.comm.comm.cdb = None
    gc.collect()


class Ranks:
    """A pool of processes that run a function at any world size up to its own; each starts when it is first needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        self.tasks = 0
        self.connections: list[Connection] = []
        self.processes: list[SpawnProcess] = []

    def _start(self, world_size: int) -> None:
        """Start the ranks that are not running yet: many tests need one or two, and each imports for seconds."""
        assert world_size <= self.size
        context = multiprocessing.get_context("spawn")
        for rank in range(len(self.processes), world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what the function, of an importable module, returns on each rank. Raise RankError with a traceback.

        Configurations are resolved for the ranks.
        """
        self._start(world_size)
        used = self.connections[:world_size]
        resolved = [at_world_size(each, world_size) if isinstance(each, Config) else each for each in arguments]
        self._open_group(used, function, resolved)
        answers, errors, hung = [], [], False
        for rank, connection in enumerate(used):
            # After an error the other ranks may hang: do not wait as long for each of them.
            if not connection.poll(TIMEOUT_SECONDS if not errors else 1):
                errors.append(f"rank {rank} did not return within {TIMEOUT_SECONDS} s")
                hung = True
                continue
            ok, answer = connection.recv()
            (answers if ok else errors).append(answer)
        if hung:
            self._kill()  # its answer would be read as that of the next task
        if errors:
            raise RankError(max(errors, key=len))
        return answers

    def _kill(self) -> None:
        """Kill all ranks; the next task starts new ones."""
        for process in self.processes:
            process.kill()
            process.join()
        self.connections, self.processes = [], []

    def _open_group(self, used: Sequence[Connection], function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Send the task to each rank, which starts it when all have opened their process group."""
        for _ in range(OPEN_ATTEMPTS):
            self.tasks += 1
            store = Path(self.folder.name) / f"store_{self.tasks}"
            for connection in used:
                connection.send((function, arguments, len(used), store))
            errors = [
                connection.recv() if connection.poll(TIMEOUT_SECONDS) else "a rank did not open its process group"
                for connection in used
            ]
            opened = not any(errors)
            for connection in used:
                connection.send(opened)
            if opened:
                return
        raise RankError(max(filter(None, errors), key=len))

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()
        self.folder.cleanup()
