"""`mtp-dist launch`: the ranks of one machine, which get every signal that this process gets."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from mtp_dist.training.stopping import STOP_SIGNALS, exit_status

SECONDS_AFTER_A_FAILURE = 15.0
"""Given to the ranks that are left when one has failed, to print what they know."""
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Train on so many processes and return their exit status.

    A stop signal reaches every rank, and they get the time that they need to save. If a rank fails, the others end.
    """
    return _Ranks(ranks, [sys.executable, "-m", "mtp_dist.pretrain", *arguments]).wait()


class _Ranks:
    """The processes of a run. To be created in the main thread."""

    def __init__(self, count: int, command: Sequence[str]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._received = 0
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of SIGHUP under nohup, which ranks inherit
                signal.signal(number, self._forward)
        for rank in range(count):
            self._processes.append(
                subprocess.Popen(command, env=_environment(rank, count), preexec_fn=_end_with_parent)
            )
        if self._received:  # some may have started after it
            self._send(self._received)

    def wait(self) -> int:
        """Return the status of the first rank that did not end well, or 0, when all have ended."""
        status, deadline = 0, float("inf")
        while left := self._running():
            failed = [rank for rank, process in enumerate(self._processes) if process.poll()]
            if failed and not status:
                status, deadline = self._status(failed[0]), time.monotonic() + SECONDS_AFTER_A_FAILURE
                if not self._received:
                    self._send(signal.SIGTERM)
            if time.monotonic() > deadline:
                for process in left:
                    process.kill()
            time.sleep(POLL_SECONDS)
        failed = [rank for rank, process in enumerate(self._processes) if process.returncode]
        return status or (self._status(failed[0]) if failed else 0)

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._received = number
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # which does nothing to one that has ended

    def _status(self, rank: int) -> int:
        code = self._processes[rank].returncode
        if code >= 0:
            return code
        if -code == self._received:
            return exit_status(-code)  # before its first line
        print(f"error: rank {rank} was ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        return 128 - code


def _environment(rank: int, count: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    port = os.environ.setdefault("MASTER_PORT", str(_free_port()))
    return {
        **os.environ,
        **{name: str(value) for name, value in names.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this rank if the launcher is killed: it saves instead of running on unseen."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
