"""Stopping between two steps when a signal asks for it, in time to save a checkpoint."""

import os
import signal
import threading
from time import monotonic
from typing import Self

REQUEUE = 75
"""Exit status of a run that a signal stopped after a save: the same command goes on. EX_TEMPFAIL of sysexits.h."""

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_OF_ONE_REQUEST = 1.0
"""SIGTERMs so close together are one: a launcher may pass on what its ranks have got themselves."""


class StopSignals:
    """Notes SIGTERM and SIGUSR1 of this process inside a `with`, which is to be in the main thread.

    A second SIGTERM ends the process at once, also where it waits for a rank that no longer answers: Python runs
    handlers between two instructions of the main thread only, so a thread of its own reads what the operating system
    has delivered.
    """

    received = 0
    """The number of the last signal, 0 before."""

    def __enter__(self) -> Self:
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._watch, args=(reading,), name="stop signals", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
        for number in STOPPING:
            signal.siginterrupt(number, False)  # libraries need not know of signals: their system calls go on
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)

    def _watch(self, reading: int) -> None:
        first_sigterm = None
        with open(reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in STOPPING:
                    self.received = number[0]
                if number[0] == signal.SIGTERM:
                    if first_sigterm and monotonic() - first_sigterm > SECONDS_OF_ONE_REQUEST:
                        os._exit(128 + signal.SIGTERM)
                    first_sigterm = first_sigterm or monotonic()
