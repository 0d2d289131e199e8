"""Several processes run the tasks, and the results come in the order of the tasks."""

import os
import signal
import time

import pytest

from mtp_dist.data.prepare import worker_pool
from mtp_dist.data.prepare.worker_pool import WorkerDiedError, map_in_order
from mtp_dist.errors import ConfigError


def double(task):
    """Double a number; some of them fail or take longer."""
    if task % 7 == 0:
        time.sleep(0.02)
    if task == 50:
        raise ConfigError("not 50")
    if task == 51:
        raise KeyError("a bug")
    if task == 52:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("ahead", [1, 8])
def test_all_results_come_in_order(monkeypatch, num_workers, ahead):
    monkeypatch.setattr(worker_pool, "TASKS_AHEAD", ahead)
    results = []
    for number, pair in enumerate(map_in_order(double, range(40), num_workers)):
        if number % 10 == 0:
            time.sleep(0.05)  # a slow consumer
        results.append(pair)
    assert results == [(task, 2 * task) for task in range(40)]
    assert list(map_in_order(double, (), num_workers)) == []


def test_tasks_are_drawn_no_further_than_needed():
    """Tasks may be large and come from a stream."""
    drawn = []
    running = map_in_order(double, (drawn.append(task) or task % 50 for task in range(1000)), 2)
    next(running)
    assert len(drawn) <= 2 * worker_pool.TASKS_AHEAD
    running.close()


def test_errors_and_deaths_are_raised():
    for task, error, text in (
        (50, ConfigError, "not 50"),
        (51, RuntimeError, r"in a worker process:\n(.*\n)*KeyError: 'a bug'"),
        (52, WorkerDiedError, "a worker ended with status -9"),
    ):
        with pytest.raises(error, match=text) as raised:
            list(map_in_order(double, [1, task], 2))
        assert getattr(raised.value, "task", task) == task
