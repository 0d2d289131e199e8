"""Rendezvous of the ranks of a job: with a timeout, and a message that names the missing ranks."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mtp_dist.distributed.environment import find_differences
from mtp_dist.errors import LaunchError

logger = logging.getLogger(__name__)

FIRST_STATUS_AFTER_S = 30.0
"""Time after which rank 0 logs which ranks are missing."""
STORE_SHUTDOWN_GRACE_S = 1.0
"""Time that rank 0 waits longer than the others: the store, which they may be polling, ends with it."""
POLL_INTERVAL_S = 0.2
ALL_JOINED = "all joined"
"""Key that rank 0 sets when all ranks have joined: empty, or why the run cannot start."""
ACKNOWLEDGED = "read"
"""Key that counts the ranks that have read ALL_JOINED."""
ACKNOWLEDGE_TIMEOUT_S = 10.0


def join(
    rank: int, world_size: int, seconds: float, description: Mapping[str, str], refusal: str | None = None
) -> Store:
    """Wait until all ranks have joined at MASTER_ADDR:MASTER_PORT. Return the store for the process group.

    Raise LaunchError after `seconds`, on rank 0 with the missing ranks, or if the ranks' descriptions (see
    describe_rank) differ, on rank 0 with the deviating ranks. refusal: why rank 0 refuses to start; it is raised there
    without waiting for the others.
    """
    address, port = _rendezvous_address(world_size)
    where, deadline = f"{address}:{port} (MASTER_ADDR:MASTER_PORT)", time.monotonic() + seconds
    limit = f"within run.join_timeout = {seconds:g} s"
    # torchrun's agents have opened the store themselves.
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not opens:
        _await_listener(address, port, deadline, f"rank {rank} cannot reach {where} {limit}")
    try:
        # Without wait_for_workers, which does not name ranks and ends in a C++ traceback.
        store = TCPStore(address, port, world_size, opens, timedelta(seconds=max(1.0, seconds)), wait_for_workers=False)
        # Ranks that torchrun restarts find the keys of the first start.
        keys = PrefixStore(f"join {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        keys.set(str(rank), json.dumps(dict(description)))
        if refusal:
            _end_start(keys, world_size, refusal)
        _await_all(keys, rank, world_size, deadline, where, limit)
        _check_agreement(keys, rank, world_size)
    except DistError as error:
        if refusal:  # the run that it names may be the one that uses the port
            raise LaunchError(refusal) from None
        reason = str(error).partition("\n")[0].rstrip(".")
        raise LaunchError(
            f"rank {rank} cannot {'open' if opens else 'use'} the rendezvous address {where}: {reason}; check rank 0, "
            "or choose another MASTER_PORT"
        ) from None
    return keys


def _rendezvous_address(world_size: int) -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise LaunchError(
            f"WORLD_SIZE = {world_size} with MASTER_ADDR = '{address}' and MASTER_PORT = '{port}': the ranks need "
            "a valid address and port, set them or start with deepspeed, torchrun or launchers/slurm/pretrain.sbatch"
        )
    return address, int(port)


def _await_listener(address: str, port: int, deadline: float, failed: str) -> None:
    """Wait until a process listens there. TCPStore would wait too, but with a C++ traceback per attempt."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{failed} ({error.strerror or error}): check that rank 0 runs and accepts connections from here"
                ) from None
            time.sleep(POLL_INTERVAL_S)


def _await_all(keys: Store, rank: int, world_size: int, deadline: float, where: str, limit: str) -> None:
    """Wait on rank 0 for the other ranks, and on these until rank 0 reports that all have joined."""

    def missing() -> str:
        absent = [other for other in range(world_size) if not keys.check([str(other)])]
        return f"{world_size - len(absent)} of {world_size} ranks joined at {where}, missing: {_listed(absent)}"

    expected, silent_until = [ALL_JOINED], float("inf")
    if rank == 0:
        deadline += STORE_SHUTDOWN_GRACE_S
        expected, silent_until = [str(other) for other in range(world_size)], time.monotonic() + FIRST_STATUS_AFTER_S
    while not keys.check(expected):
        if time.monotonic() > deadline:
            if rank == 0:
                remedy = f"check their logs, or start WORLD_SIZE = {world_size} ranks"
                raise LaunchError(f"{limit} only {missing()}: {remedy}")
            raise LaunchError(f"{limit} not all of the {world_size} ranks joined at {where}: rank 0 reports which")
        if time.monotonic() > silent_until:
            logger.warning("%s; waiting %s", missing(), limit)
            silent_until = float("inf")
        time.sleep(POLL_INTERVAL_S)


def _check_agreement(keys: Store, rank: int, world_size: int) -> None:
    """Raise LaunchError on every rank if they differ. Rank 0 compares them and releases the others."""
    if rank != 0:
        if keys.get(ALL_JOINED):
            keys.add(ACKNOWLEDGED, 1)
            raise LaunchError("this run cannot start: rank 0 reports why")
        return
    ranks = [json.loads(text) for text in keys.multi_get([str(other) for other in range(world_size)])]
    if differences := find_differences(ranks):
        _end_start(keys, world_size, differences)
    keys.set(ALL_JOINED, "")


def _end_start(keys: Store, world_size: int, reason: str) -> NoReturn:
    """Raise LaunchError on rank 0 after the other ranks have done so: the store ends with rank 0."""
    keys.set(ALL_JOINED, reason)
    deadline = time.monotonic() + ACKNOWLEDGE_TIMEOUT_S
    while keys.add(ACKNOWLEDGED, 0) < world_size - 1 and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)
    raise LaunchError(reason)


def _listed(ranks: list[int]) -> str:
    """Return the first ranks, as text."""
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown} and {len(ranks) - 16} more"
