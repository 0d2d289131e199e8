"""Standard output and standard error that a run does not depend on, and without known warnings of libraries."""

import errno
import io
import os
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

READER_IS_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a write to a pipe without a reader, to a closed terminal and to a closed descriptor."""


class _OptionalOutput(io.FileIO):
    """A file descriptor whose writes never fail: text that cannot be written is dropped."""

    def write(self, data: "ReadableBuffer") -> int:
        try:
            written = super().write(data)
        except OSError as error:
            written = None
            if error.errno in READER_IS_GONE:
                self._discard_output(error)
        return memoryview(data).nbytes if written is None else written

    def _discard_output(self, error: OSError) -> None:
        """Discard what this process, its libraries and its children write to this descriptor from now on."""
        descriptor = self.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
        if descriptor == 1:
            with suppress(OSError):
                os.write(2, f"warning: standard output is gone ({error.strerror}), the run continues\n".encode())


def make_output_optional() -> None:
    """Let this process continue if its output has no reader any more, or if there is no room for it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Started with `>&-`: the next opened file would get this number, and libraries would print into it.
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _optional(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _optional(sys.stderr, 2)


def _optional(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream:
        with suppress(OSError):
            stream.flush()
    # Each complete line is written at once, also into a file, so that a rank that is killed loses none.
    return io.TextIOWrapper(
        io.BufferedWriter(_OptionalOutput(descriptor, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors=(stream and stream.errors) or "backslashreplace",
        line_buffering=True,
    )


def silence_import_warnings() -> None:
    """Drop the warnings that Megatron-core prints at import on each rank; a run's own warnings stay."""
    for known in (
        "Transformer Engine and Apex are not installed",
        "full scope is deprecated",
        "`torch.distributed.all_gather_into_tensor` is deprecated",
        "`torch.distributed.reduce_scatter_tensor` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=known)
