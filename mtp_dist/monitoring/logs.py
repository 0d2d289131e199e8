"""Logging of a run: what each rank prints of the records of `logging.getLogger("mtp_dist...")`."""

import logging
import sys
from contextlib import suppress

PACKAGE_LOGGER = logging.getLogger("mtp_dist")


class ConsoleHandler(logging.Handler):
    """A handler that prints warnings and errors with their level on standard error, and the rest on standard output.

    The streams are those of the moment: a progress bar replaces them while it is shown.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text, stream = self.format(record), sys.stdout
        if record.levelno >= logging.WARNING:
            text, stream = f"{record.levelname.lower()}: {text}", sys.stderr
        with suppress(OSError):  # the output may be a file on a full disk
            print(text, file=stream, flush=True)


def configure_logging(rank: int, level: int = logging.INFO) -> None:
    """Print what the package logs from `level` on; on ranks other than 0 only what has `extra={"all_ranks": True}`."""
    console = ConsoleHandler(level)
    console.addFilter(lambda record: rank == 0 or getattr(record, "all_ranks", False))
    PACKAGE_LOGGER.handlers = [console]
    PACKAGE_LOGGER.setLevel(logging.INFO)
    PACKAGE_LOGGER.propagate = False  # a library that calls logging.basicConfig would print each line again
