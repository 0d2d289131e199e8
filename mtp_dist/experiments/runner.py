"""Runs the tasks of an experiment, several at a time, and stops them with the signals that stop this process."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

from mtp_dist.distributed.processes import end_with_parent
from mtp_dist.errors import LaunchError
from mtp_dist.experiments.tasks import Task

POLL_INTERVAL_S = 0.2
NICENESS = 10
"""Niceness added to the tasks, so that the machine stays usable."""
LOCK = "experiment.lock"
LOCK_TIMEOUT_S = 60.0
"""Seconds that the processes of a killed start have to save and end."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Environment = Mapping[str, str]


class Observer(Protocol):
    """A display of the tasks."""

    def on_start(self, task: Task) -> None: ...

    def on_poll(self, running: Sequence[Task]) -> None:
        """Show how far the tasks are; called several times per second."""

    def on_end(self, task: Task, failure: str | None) -> None:
        """Show that a task has ended. failure: why it has no result, if so."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of an experiment's tasks."""

    failures: Mapping[Task, str]
    """Why a task has no result."""
    signal: int
    """Signal that stopped the experiment, or 0."""


def visible_gpus(count: int) -> list[str]:
    """Return the names of this process's GPUs in CUDA_VISIBLE_DEVICES, which may leave some to others."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (given.split(",") if given else [str(index) for index in range(count)])[:count]


def device_slots(ranks: int, cores: int, gpus: Sequence[str], runs_per_gpu: int) -> list[Environment]:
    """Return the environment of each task that may run at the same time.

    A run has `ranks` GPUs of its own, or shares one with others; without GPUs it has as many cores. Raise LaunchError
    if there are too few.
    """
    if gpus:
        groups = [gpus[first : first + ranks] for first in range(0, len(gpus) - ranks + 1, ranks)]
        shared = runs_per_gpu if ranks == 1 else 1
        slots = [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for _ in range(shared) for group in groups]
        threads = max(1, cores // max(1, len(slots) * ranks))
    else:
        slots = [{} for _ in range(cores // ranks)]
        threads = 1
    if not slots:
        kind = f"{len(gpus)} GPUs" if gpus else f"{cores} cores"
        raise LaunchError(
            f"a run needs ranks = {ranks} processes and this machine has {kind}: give another --preset, or --slurm"
        )
    return [slot | {"OMP_NUM_THREADS": str(threads)} for slot in slots]


@contextmanager
def hold_lock(folder: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold the lock of an experiment's folder and yield its file descriptor, which the trainings inherit.

    So it is free only when the trainings of a killed start have ended too. Raise LaunchError if it is not within
    LOCK_TIMEOUT_S.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline, is_waiting = time.monotonic() + LOCK_TIMEOUT_S, False
    with (folder / LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"{folder} is in use by another `mtp-dist experiment`: wait until it ends"
                    ) from None
            if not is_waiting:
                on_wait()
            is_waiting = True
            time.sleep(POLL_INTERVAL_S)
        yield file.fileno()


class _RunningTask(NamedTuple):
    """The process of a task."""

    process: subprocess.Popen[bytes]
    environment: Environment
    log_start: int
    """Bytes that the task's log already had."""


class TaskRunner:
    """The running tasks of an experiment; created and used in the main thread."""

    def __init__(self, tasks: Sequence[Task], slots: Sequence[Environment], observer: Observer, lock: int) -> None:
        self._waiting = list(tasks)
        self._free = list(slots)
        self._observer = observer
        self._lock = lock
        self._running: dict[Task, _RunningTask] = {}
        self._failures: dict[Task, str] = {}
        self._received = 0

    def run(self) -> Outcome:
        """Run every task that is not done, after those that it needs. A signal stops them all; they save and end."""
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:  # such as SIGHUP under nohup
                signal.signal(number, self._forward)
        try:
            while True:
                self._start_tasks()
                if not self._running:
                    return Outcome(self._failures, self._received)
                self._observer.on_poll(list(self._running))
                time.sleep(POLL_INTERVAL_S)
                self._end_tasks()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _start_tasks(self) -> None:
        for task in list(self._waiting):
            if self._received:
                return
            if task.is_done():
                self._waiting.remove(task)
                self._observer.on_end(task, None)
            elif task.after in self._failures:
                self._waiting.remove(task)
                self._fail(task, f"its {task.after.kind} failed" if task.after else "")
            elif self._free and (task.after is None or task.after.is_done()):
                self._waiting.remove(task)
                self._start(task)

    def _start(self, task: Task) -> None:
        environment = self._free.pop(0)
        task.folder.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(
                task.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                pass_fds=[self._lock],
                start_new_session=True,  # Ctrl-C reaches the tasks once, from here
                preexec_fn=_lower_priority_and_end_with_parent,
            )
        self._running[task] = _RunningTask(process, environment, log_start)
        if self._received:  # it may have started after the signal
            process.send_signal(self._received)
        self._observer.on_start(task)

    def _end_tasks(self) -> None:
        for task, (process, environment, log_start) in list(self._running.items()):
            if (status := process.poll()) is None:
                continue
            del self._running[task]
            self._free.insert(0, environment)
            if not status and task.is_done():
                self._observer.on_end(task, None)
            elif not self._received:
                self._fail(task, f"exit status {status}, see {task.log}{_last_error(task.log, log_start)}")

    def _fail(self, task: Task, reason: str) -> None:
        self._failures[task] = reason
        self._observer.on_end(task, reason)

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._received = number
        for running in self._running.values():
            running.process.send_signal(number)  # no effect on a process that has ended


def _last_error(log: Path, start: int) -> str:
    """Return the last line after the first `start` bytes of a log that names an error."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    errors = [line.strip() for line in lines if line.startswith("error") or "Error: " in line]
    return f": {errors[-1]}" if errors else ""


def _lower_priority_and_end_with_parent() -> None:
    os.nice(NICENESS)
    end_with_parent()
