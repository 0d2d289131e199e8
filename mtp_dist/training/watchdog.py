"""Ending a run that hangs, with the stacks that tell where."""

import faulthandler
import os
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Self

from mtp_dist.distributed.flight_recorder import dump_flight_recorder

EXIT_HUNG = 70
"""Exit status. EX_SOFTWARE of sysexits.h."""
GRACE_SECONDS = 10.0
"""Given to this class's own thread, which runs only while no other keeps Python's lock."""


class Watchdog:
    """Inside a `with`, ends the process where a part of the run takes longer than `seconds`; None never does.

    It prints the Python stacks of all threads first, and writes the last collectives. Each rank has its own, so that
    all that wait for a rank that hangs tell where, and so does that rank unless it is stopped altogether.
    """

    def __init__(self, seconds: float | None, rank: int, record_folder: Path | None = None) -> None:
        """record_folder: where to write the flight recorder's record, a file for each rank; nowhere when None."""
        self._record = record_folder and record_folder / f"rank_{rank:05d}"
        self._seconds = seconds
        self._rank = rank
        self._left = threading.Event()
        self._phase = ""
        self._began = monotonic()

    def __enter__(self) -> Self:
        self.enter("the start")
        if self._seconds is not None:
            threading.Thread(target=self._watch, args=(self._seconds,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        faulthandler.cancel_dump_traceback_later()

    def enter(self, phase: str) -> None:
        """From now on it is this that takes its time."""
        self._phase, self._began = phase, monotonic()
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds + GRACE_SECONDS, exit=True)

    def _watch(self, seconds: float) -> None:
        while (left := self._began + seconds - monotonic()) > 0:
            if self._left.wait(left):
                return
        what = f"rank {self._rank}: {self._phase} takes longer than run.step_timeout = {seconds:g} s"
        print(f"error: {what}; all threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        try:
            # NCCL would write it only at its own time limit, which is longer.
            if self._record and (last := dump_flight_recorder(self._record)):
                print(f"rank {self._rank}: its last collective was {last}; more in {self._record}", file=sys.stderr)
        except Exception as error:
            print(f"rank {self._rank}: its last collectives cannot be written: {error}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(EXIT_HUNG)
