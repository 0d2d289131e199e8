"""Several processes do the tasks, and the results come in the tasks' order."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from mtp_dist.data.prepare import worker_pool as workers
from mtp_dist.data.prepare.worker_pool import WorkerDiedError, map_in_order
from mtp_dist.errors import UserError


class Doubler:
    """A task is a number; some of them mean something special."""

    def __call__(self, task: int) -> int:
        if task % 7 == 0:
            time.sleep(0.02)
        if task == 50:
            raise UserError("not 50")
        if task == 51:
            raise KeyError("a bug")
        if task == 52:
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * task


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("ahead", [1, 8])
def test_results_come_in_order_and_all_of_them(monkeypatch: pytest.MonkeyPatch, num_workers: int, ahead: int) -> None:
    monkeypatch.setattr(workers, "TASKS_AHEAD", ahead)
    results = []
    for number, pair in enumerate(map_in_order(Doubler(), range(40), num_workers)):
        if number % 10 == 0:
            time.sleep(0.05)  # a consumer that takes its time
        results.append(pair)
    assert results == [(task, 2 * task) for task in range(40)]
    assert list(map_in_order(Doubler(), (), num_workers)) == []


def test_tasks_are_drawn_no_further_than_needed() -> None:
    """Tasks may be large and come from a stream."""
    drawn = []

    def tasks() -> Iterator[int]:
        for task in range(1000):
            drawn.append(task)
            yield task % 50

    running = map_in_order(Doubler(), tasks(), 2)
    next(running)
    assert len(drawn) <= 2 * workers.TASKS_AHEAD
    running.close()  # type: ignore[attr-defined]


def test_what_the_function_raises_is_raised() -> None:
    with pytest.raises(UserError, match="not 50"):
        list(map_in_order(Doubler(), [1, 50], 2))
    with pytest.raises(RuntimeError, match=r"in a worker process:\n(.*\n)*KeyError: 'a bug'"):
        list(map_in_order(Doubler(), [1, 51], 2))


def test_a_worker_that_dies_is_told_with_its_task() -> None:
    with pytest.raises(WorkerDiedError) as death:
        list(map_in_order(Doubler(), [1, 52], 2))
    assert death.value.task == 52 and death.value.exit_code == -signal.SIGKILL
