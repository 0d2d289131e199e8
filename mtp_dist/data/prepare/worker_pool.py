"""Map a function over tasks in several processes, with the results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from mtp_dist.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_AHEAD = 2
"""Tasks per worker that may finish before the next result in order: room for a slow task."""


class WorkerDiedError(Exception):
    """The error for a worker process that exited or was killed."""

    def __init__(self, task: object, exit_code: int | None) -> None:
        super().__init__(f"a worker ended with status {exit_code}")
        self.task = task
        self.exit_code = exit_code


class _Worker(Generic[Task, Result]):
    """One process and the task that it works on."""

    def __init__(self, function: Callable[[Task], Result], context: Any) -> None:
        self.connection, child_end = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(function, child_end), daemon=True)
        self.process.start()
        child_end.close()
        self.number: int | None = None

    def send(self, number: int, task: Task) -> None:
        self.number = number
        try:
            self.connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            self.process.join()
            raise WorkerDiedError(task, self.process.exitcode) from None

    def result(self, task: object) -> tuple[int, Result]:
        """Return the number and the result of the finished task. Raise what the function raised."""
        try:
            succeeded, outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise WorkerDiedError(task, self.process.exitcode) from None
        if not succeeded:
            raise outcome
        assert self.number is not None
        number, self.number = self.number, None
        return number, outcome


def _work(function: Callable[[Any], object], connection: Connection) -> None:
    """Run tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            outcome: object = function(task)
        except UserError as error:
            connection.send((False, error))
        except Exception:
            connection.send((False, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))
        else:
            connection.send((True, outcome))


def _end_with_parent() -> None:
    # A killed parent cannot stop its workers, and they must not disturb the next run.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def preload_modules(*modules: str) -> None:
    """Start to import modules for all future workers, without waiting."""
    forkserver.set_forkserver_preload(["__main__", *modules])
    forkserver.ensure_running()


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result. `function` is pickled once per worker.

    Raise the first error of the function, or WorkerDiedError. The workers end with the iteration.
    """
    context = multiprocessing.get_context("forkserver")
    workers: list[_Worker[Task, Result]] = [_Worker(function, context) for _ in range(num_workers)]
    try:
        yield from _run(workers, enumerate(tasks), TASKS_AHEAD * num_workers)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _run(
    workers: list[_Worker[Task, Result]], numbered: Iterator[tuple[int, Task]], window: int
) -> Iterator[tuple[Task, Result]]:
    tasks: dict[int, Task] = {}
    results: dict[int, Result] = {}
    next_number = 0

    def feed() -> None:
        idle = [worker for worker in workers if worker.number is None]
        while idle and len(tasks) < window and (following := next(numbered, None)):
            number, task = following
            tasks[number] = task
            idle.pop().send(number, task)

    while True:
        feed()
        busy = {worker.connection: worker for worker in workers if worker.number is not None}
        if not busy:
            return
        for ready in wait(list(busy)):
            worker = busy[ready]
            assert worker.number is not None
            number, result = worker.result(tasks[worker.number])
            results[number] = result
        feed()  # the consumer of the results may be slow
        while next_number in results:
            yield tasks.pop(next_number), results.pop(next_number)
            next_number += 1
