"""Measured rates of a cluster, from the `preflight.json` that a training with --preflight has written."""

import json
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
    ranks = _read_ranks(path)
    hosts = {rank["rank"]: rank["host"] for rank in ranks}
    links, networks = [], []
    for rank in ranks:
        for rate, ranks_per_host in _transfers(rank, hosts):
            if ranks_per_host is None:
                links.append(rate)
            else:
                networks.append(rate / ranks_per_host)
    return replace(
        rates,
        matmul=1e12 * statistics.median(rank["values"]["matmul"] for rank in ranks),
        link=statistics.median(links) if links else rates.link,
        network=statistics.median(networks) if networks else rates.network,
    )


def _read_ranks(path: str | Path) -> list[dict[str, Any]]:
    try:
        ranks = json.loads(Path(path).read_text(encoding="utf-8"))["ranks"]
        if ranks and all(rank["values"]["matmul"] > 0 and rank["host"] and rank["groups"] for rank in ranks):
            return ranks
    except OSError as error:
        raise LaunchError(f"--preflight = '{path}' cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise LaunchError(
        f"--preflight = '{path}' is not a valid preflight.json: give the file that a training with --preflight has "
        "written into its output folder"
    )


def _transfers(rank: Mapping[str, Any], hosts: Mapping[int, str]) -> Iterator[tuple[float, int | None]]:
    """Yield a rank's bytes per second in each transfer, with the ranks per host that carry it; None within a host."""
    for kind, gigabytes in rank["values"].items():
        if kind == "matmul":
            continue
        per_host = Counter(hosts[member] for member in rank["groups"][kind])
        yield 1e9 * gigabytes, max(per_host.values()) if len(per_host) > 1 else None
