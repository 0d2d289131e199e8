"""Measured rates of a cluster, from the `preflight.json` that a training with --preflight has written."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtp_dist.errors import LaunchError
from mtp_dist.planner.devices import Rates


def measured_rates(rates: Rates, path: str | Path) -> Rates:
    """Return the rates with those replaced that a preflight has measured. Raise LaunchError if it is not a valid one.

    A rate is the median over all ranks, links or groups.
    """
    matmuls, transfers = _read_measurements(path)
    links = [rate for rate, ranks_per_host in transfers if ranks_per_host is None]
    networks = [rate / ranks_per_host for rate, ranks_per_host in transfers if ranks_per_host is not None]
    return replace(
        rates,
        matmul=1e12 * statistics.median(matmuls),
        link=statistics.median(links) if links else rates.link,
        network=statistics.median(networks) if networks else rates.network,
    )


def _read_measurements(path: str | Path) -> tuple[list[float], list[tuple[float, int | None]]]:
    """Return the TFLOP/s of all ranks, and the bytes per second of their transfers as in `_transfers`."""
    try:
        ranks = json.loads(Path(path).read_text(encoding="utf-8"))["ranks"]
        hosts = {rank["rank"]: rank["host"] for rank in ranks}
        if ranks and all(0 < rate < math.inf for rank in ranks for rate in rank["values"].values()):
            transfers = [transfer for rank in ranks for transfer in _transfers(rank, hosts)]
            return [rank["values"]["matmul"] for rank in ranks], transfers
    except OSError as error:
        raise LaunchError(f"--preflight = '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise LaunchError(
        f"--preflight = '{path}' is not a valid preflight.json with a rate above 0 of each measurement: give the "
        "file that a training with --preflight has written into its output folder"
    )


def _transfers(rank: Mapping[str, Any], hosts: Mapping[int, str]) -> Iterator[tuple[float, int | None]]:
    """Yield a rank's bytes per second in each transfer, with the ranks per host that carry it; None within a host."""
    for kind, gigabytes in rank["values"].items():
        if kind == "matmul":
            continue
        per_host = Counter(hosts[member] for member in rank["groups"][kind])
        yield 1e9 * gigabytes, max(per_host.values()) if len(per_host) > 1 else None
