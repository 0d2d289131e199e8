"""How the ranks of a job find each other: within a limit, and with a sentence about who is missing."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mtp_dist.distributed.environment import find_differences
from mtp_dist.errors import ConfigError

FIRST_STATUS_AFTER_S = 30.0
"""After these rank 0 says whom it waits for."""
STORE_SHUTDOWN_GRACE_S = 1.0
"""That rank 0 waits longer than they: with it ends the store, which they may be asking."""
POLL_SECONDS = 0.2
ALL_HERE = "all here"
"""Key that rank 0 sets when all have come: to nothing, or to why the run cannot start."""
READ = "read"
"""Key that counts the ranks that have read it."""
SECONDS_TO_READ = 10.0


def join(
    rank: int, world_size: int, seconds: float, description: Mapping[str, str], refusal: str | None = None
) -> Store:
    """Wait until all ranks have come to MASTER_ADDR:MASTER_PORT; the store is what opens the process group.

    Raise ConfigError after `seconds`, on rank 0 with the ranks that have not come, and if the ranks' descriptions (see
    describe_rank) differ, on rank 0 with those that do. refusal: why the run must not start, if rank 0 knows a reason;
    it is raised on rank 0 without waiting for all.
    """
    address, port = _meeting_point(world_size)
    where, deadline = f"{address}:{port} (MASTER_ADDR:MASTER_PORT)", time.monotonic() + seconds
    limit = f"within run.join_timeout = {seconds:g} s"
    # The agents of torchrun have opened the store themselves.
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not opens:
        _await_listener(address, port, deadline, f"rank {rank} cannot reach {where} {limit}")
    try:
        # Without wait_for_workers: that names no ranks and ends in a C++ traceback.
        store = TCPStore(address, port, world_size, opens, timedelta(seconds=max(1.0, seconds)), wait_for_workers=False)
        # Ranks that torchrun starts again find the keys of the first start.
        keys = PrefixStore(f"join {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        keys.set(str(rank), json.dumps(dict(description)))
        if refusal:
            _end_start(keys, world_size, refusal)
        _await_all(keys, rank, world_size, deadline, where, limit)
        _check_agreement(keys, rank, world_size)
    except DistError as error:
        if refusal:  # which may be the run that uses the port
            raise ConfigError(refusal) from None
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"rank {rank} cannot {'open' if opens else 'use'} the meeting point {where}: {reason}; look at rank 0, or "
            "choose another MASTER_PORT"
        ) from None
    return keys


def _meeting_point(world_size: int) -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"WORLD_SIZE = {world_size} with MASTER_ADDR = '{address}' and MASTER_PORT = '{port}': they say where the "
            "ranks meet, set them or start with deepspeed, torchrun or launchers/slurm/pretrain.sbatch"
        )
    return address, int(port)


def _await_listener(address: str, port: int, deadline: float, failed: str) -> None:
    """Until somebody listens there. TCPStore would wait too, but with a C++ traceback for each attempt."""
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{failed} ({error.strerror or error}): is rank 0 running, and may this machine connect to it?"
                ) from None
            time.sleep(POLL_SECONDS)


def _await_all(keys: Store, rank: int, world_size: int, deadline: float, where: str, limit: str) -> None:
    """Wait on rank 0 for the other ranks, and on these for rank 0's word that all have come."""

    def missing() -> str:
        absent = [other for other in range(world_size) if not keys.check([str(other)])]
        return f"{world_size - len(absent)} of {world_size} ranks came to {where}, missing: {_listed(absent)}"

    def fail() -> NoReturn:
        if rank == 0:
            raise ConfigError(f"{limit} only {missing()}: look at their logs, or start as many as WORLD_SIZE says")
        raise ConfigError(f"{limit} not all of the {world_size} ranks came to {where}: rank 0 says which")

    def complain() -> None:
        if rank == 0:
            print(f"{missing()}; waits {limit}", file=sys.stderr, flush=True)

    if rank == 0:
        deadline += STORE_SHUTDOWN_GRACE_S
    expected = [str(other) for other in range(world_size)] if rank == 0 else [ALL_HERE]
    _poll(lambda: keys.check(expected), deadline, complain, fail)


def _check_agreement(keys: Store, rank: int, world_size: int) -> None:
    """Raise ConfigError on every rank if they differ. Rank 0 compares them and leads the others on."""
    if rank != 0:
        if keys.get(ALL_HERE):
            keys.add(READ, 1)
            raise ConfigError("this run cannot start: rank 0 reports why")
        return
    ranks = [json.loads(text) for text in keys.multi_get([str(other) for other in range(world_size)])]
    if differences := find_differences(ranks):
        _end_start(keys, world_size, differences)
    keys.set(ALL_HERE, "")


def _end_start(keys: Store, world_size: int, reason: str) -> NoReturn:
    """Raise ConfigError on rank 0, and let the other ranks do so: with rank 0 ends the store."""
    keys.set(ALL_HERE, reason)
    deadline = time.monotonic() + SECONDS_TO_READ
    while keys.add(READ, 0) < world_size - 1 and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    raise ConfigError(reason)


def _poll(
    happened: Callable[[], bool], deadline: float, complain: Callable[[], None], fail: Callable[[], NoReturn]
) -> None:
    silent_until = time.monotonic() + FIRST_STATUS_AFTER_S
    while not happened():
        if time.monotonic() > deadline:
            fail()
        if time.monotonic() > silent_until:
            complain()
            silent_until = float("inf")
        time.sleep(POLL_SECONDS)


def _listed(ranks: list[int]) -> str:
    """The first of them."""
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown} and {len(ranks) - 16} more"
