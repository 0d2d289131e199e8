"""Which signals are recorded, and what a second one does."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from mtp_dist.training.stopping import STOP_SIGNALS, StopSignals, exit_status

TIMEOUT_S = 20


@pytest.mark.parametrize("numbers", [*([number] for number in STOP_SIGNALS), [signal.SIGUSR1, *[signal.SIGTERM] * 2]])
def test_signals_are_recorded(numbers):
    """One SIGTERM may arrive twice, and after another signal."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals() as signals:
        assert signals.received == 0
        assert all(signal.getsignal(number) not in before for number in STOP_SIGNALS)
        for number in numbers:
            os.kill(os.getpid(), number)
            deadline = time.monotonic() + TIMEOUT_S
            while signals.received != number:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


# The main thread waits inside a call of a C library, as in a collective with a rank that is gone.
STUCK = """
import ctypes, os, signal, threading, time
from mtp_dist.training import stopping
stopping.SIGNAL_DEBOUNCE_S = 0.0
with stopping.StopSignals() as signals:
    def report():
        while not signals.received:
            time.sleep(0.01)
        print(signals.received, flush=True)
    threading.Thread(target=report).start()
    print("ready", flush=True)
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""


@contextmanager
def started(program):
    """Start a program, wait for its "ready", and kill it at the end or if it takes too long."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(TIMEOUT_S, process.kill)
        killer.start()
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            killer.cancel()
            process.kill()


def test_only_an_interactive_stop_is_not_continued():
    statuses = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130, signal.SIGHUP: 129}
    assert {number: exit_status(number) for number in STOP_SIGNALS} == statuses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_second_signal_ends_a_stuck_process(number):
    with started(STUCK) as process:
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.value}\n"
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == 128 + number


def test_inherited_ignored_signals_stay_ignored():
    """Such as SIGHUP under nohup, and SIGINT in a shell's background job."""
    with started("import signal\nfor n in (1, 2): signal.signal(n, signal.SIG_IGN)\n" + STUCK) as process:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            process.send_signal(number)
        assert process.stdout.readline() == f"{signal.SIGUSR1.value}\n"
