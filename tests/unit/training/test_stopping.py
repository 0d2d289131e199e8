"""Which signals are noted, what a second SIGTERM does, and that all ranks stop after the same step."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_dist.training.stopping import STOPPING, StopSignals
from tests.integration import jobs
from tests.ranks import Ranks
from tests.unit.training.stopping_on_ranks import train

SECONDS_TO_WAIT = 60


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_noted(number: signal.Signals) -> None:
    with StopSignals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        wait_until(lambda: signals.received == number)


def test_one_sigterm_may_arrive_twice_and_after_another_signal() -> None:
    with StopSignals() as signals:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            wait_until(lambda number=number: signals.received == number)


def test_other_signals_are_not_noted() -> None:
    # A shell has its background jobs ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SECONDS_TO_WAIT)
        time.sleep(0.2)
        assert signals.received == 0
    signal.signal(signal.SIGINT, before)


def test_handlers_are_as_before_in_the_end() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    with StopSignals():
        assert all(signal.getsignal(number) not in before for number in STOPPING)
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


# The main thread waits inside one call of a C library, as in a collective with a rank that is gone.
STUCK = """
import ctypes, os, threading, time
from mtp_dist.training import stopping
stopping.SECONDS_OF_ONE_REQUEST = 0.0
with stopping.StopSignals() as signals:
    def say():
        while not signals.received:
            time.sleep(0.01)
        print(signals.received, flush=True)
    threading.Thread(target=say).start()
    print("ready", flush=True)
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""


def test_a_second_sigterm_ends_a_process_that_is_stuck() -> None:
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            process.terminate()
            assert process.stdout.readline() == f"{signal.SIGTERM.value}\n"
            assert process.poll() is None
            process.terminate()
            assert process.wait(SECONDS_TO_WAIT) == 128 + signal.SIGTERM
        finally:
            process.kill()


# Validated before it is saved: a run that goes on validates after later steps only.
AFTER_2 = "step 1, step 2, stop 2 by SIGUSR1, validation 2, save 2"
AFTER_3 = "step 1, step 2, validation 2, step 3, stop 3 by SIGUSR1, save 3"
NEVER = "step 1, step 2, validation 2, step 3, step 4, validation 4, save 4"


@pytest.mark.parametrize(
    ("signalled_in", "expected"),
    [((None, 2), AFTER_2), ((3, 2), AFTER_2), ((3, None), AFTER_3), ((None, None), NEVER), ((4, 4), NEVER)],
)
def test_all_ranks_stop_after_the_same_step(
    tmp_path: Path, ranks: Ranks, signalled_in: tuple[int | None, ...], expected: str
) -> None:
    config = jobs.write_config(tmp_path, parallel={"pipeline": 2}, train={"steps": 4, "validate_every": 2})
    assert ranks.run(2, train, config, signalled_in) == [(expected == NEVER, expected)] * 2
