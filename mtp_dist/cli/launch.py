"""The launcher of `mtp-dist launch`: starts the ranks of one machine and forwards every signal to them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from mtp_dist.distributed.processes import end_with_parent
from mtp_dist.training.stopping import STOP_SIGNALS, exit_status

FAILURE_GRACE_S = 15.0
"""Seconds that the other ranks have after one has failed, to print their errors."""
POLL_INTERVAL_S = 0.1


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Train on that many processes and return their exit status.

    Stop signals are forwarded to every rank, which has all the time it needs to save. If a rank fails, the others are
    ended.
    """
    return _Ranks(ranks, [sys.executable, "-m", "mtp_dist.pretrain", *arguments]).wait()


class _Ranks:
    """The processes of a run; created in the main thread."""

    def __init__(self, count: int, command: Sequence[str]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._received = 0
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # such as SIGHUP under nohup, which ranks inherit
                signal.signal(number, self._forward)
        for rank in range(count):
            self._processes.append(subprocess.Popen(command, env=_environment(rank, count), preexec_fn=end_with_parent))
        if self._received:  # some may have started after the signal
            self._send(self._received)

    def wait(self) -> int:
        """Wait for all ranks. Return the status of the first one that failed, or 0."""
        status, deadline = 0, float("inf")
        while left := [process for process in self._processes if process.poll() is None]:
            if not status and (status := self._first_failure()):
                deadline = time.monotonic() + FAILURE_GRACE_S
                if not self._received:
                    self._send(signal.SIGTERM)
            if time.monotonic() > deadline:
                for process in left:
                    process.kill()
            time.sleep(POLL_INTERVAL_S)
        return status or self._first_failure()

    def _forward(self, number: int, _: FrameType | None) -> None:
        self._received = number
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # no effect on a process that has ended

    def _first_failure(self) -> int:
        """Return the status of the first rank that has failed, or 0."""
        codes = enumerate(process.poll() for process in self._processes)
        rank, code = next(((rank, code) for rank, code in codes if code), (0, 0))
        if code >= 0:
            return code
        if -code == self._received:
            return exit_status(-code)  # before its first line
        print(f"error: rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
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
        return int(listener.getsockname()[1])
