"""Stop signals: they end the process at once until the model is built, then after a step and with a checkpoint."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Self

from mtp_dist.distributed.launcher import env_rank

EXIT_PREEMPTED = 75
"""Exit status of a run stopped by SIGTERM or SIGUSR1, which the same command resumes: EX_TEMPFAIL of sysexits.h."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
INTERACTIVE_SIGNALS = (signal.SIGINT, signal.SIGHUP)
"""Ctrl-C and a closed terminal, after which nothing may restart the run."""
SIGNAL_DEBOUNCE_S = 1.0
"""Signals this close together are one request: a launcher may forward what its ranks have received themselves."""


def exit_status(number: int) -> int:
    """Return the exit status of a run that this signal stopped: EXIT_PREEMPTED, or the shell's after Ctrl-C."""
    return 128 + number if number in INTERACTIVE_SIGNALS else EXIT_PREEMPTED


class StopSignals:
    """Context of the main thread that records the signals of STOP_SIGNALS.

    A second signal ends the process at once, SIGUSR1 not counted, even while it waits for a rank that no longer
    answers: Python runs handlers between two instructions of the main thread only, so a separate thread reads the
    delivered signals. Signals that the process inherited as ignored, such as SIGHUP under nohup, stay ignored.
    """

    received = 0
    """The last signal, or 0. A later SIGTERM does not replace SIGINT or SIGHUP: launchers send it after them."""

    _before_ending: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._watch, args=(reading,), name="stop signals", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers_before = {
            number: signal.signal(number, lambda *_: None)
            for number in STOP_SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        for number in self._handlers_before:
            signal.siginterrupt(number, False)  # system calls of libraries continue
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)

    def end_at_once(self, before_ending: Callable[[], None] = lambda: None) -> None:
        """Let a signal end the process with its exit status, after calling `before_ending`, in another thread."""
        self._before_ending = before_ending
        if self.received:
            self._end()

    def defer(self) -> None:
        """Let signals only be recorded, so that the training loop stops after a step."""
        self._before_ending = None

    def _end(self) -> None:
        status = exit_status(self.received)
        if before_ending := self._before_ending:
            with suppress(OSError):
                before_ending()
        if env_rank() == 0:
            name = signal.Signals(self.received).name
            line = f"{name}: stopped before the first step, nothing is lost (status {status}): run the command again"
            with suppress(OSError):
                os.write(2, f"{line}\n".encode())
        os._exit(status)

    def _watch(self, reading: int) -> None:
        first_request = None
        with open(reading, "rb", buffering=0) as pipe:
            while byte := pipe.read(1):
                number = byte[0]
                if number not in STOP_SIGNALS:
                    continue
                if self.received not in INTERACTIVE_SIGNALS:
                    self.received = number
                if self._before_ending:
                    self._end()
                if number != signal.SIGUSR1:
                    if first_request and monotonic() - first_request > SIGNAL_DEBOUNCE_S:
                        os._exit(128 + number)
                    first_request = first_request or monotonic()
