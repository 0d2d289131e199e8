"""A watchdog that ends a run that hangs, and prints the stacks that show why."""

import faulthandler
import os
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import Self

from mtp_dist.distributed.flight_recorder import dump_flight_recorder

EXIT_HUNG = 70
"""Exit status of a run that hung: EX_SOFTWARE of sysexits.h."""
GRACE_SECONDS = 10.0
"""Head start of this class's own thread, which cannot run while another thread keeps Python's lock."""


class Watchdog:
    """Context that ends the process if a phase of the run takes longer than `seconds`; None: never.

    First it prints the Python stacks of all threads and writes the last collectives. Each rank has a watchdog, so the
    waiting ranks report where they wait, and the hanging rank, unless it is stopped altogether, where it hangs.
    """

    def __init__(self, seconds: float | None, rank: int, record_folder: Path | None = None) -> None:
        """Write the flight recorder's records into `record_folder`, one file per rank; None: write none."""
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
        """Begin a phase, which then has `seconds` to end."""
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
