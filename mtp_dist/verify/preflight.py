"""Measurement of each rank and link before the first step, and a report of those slower than their peers."""

import json
import logging
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.distributed.collectives import all_gather_objects
from mtp_dist.distributed.device import device_name, synchronize
from mtp_dist.distributed.topology import Topology, dp_group, tp_group
from mtp_dist.training.run_folder import PREFLIGHT

logger = logging.getLogger(__name__)

SLOW = 0.8
"""Fraction of its peers' median below which a measurement is slow. Healthy GPUs of one kind differ by a few percent,
links by about ten; a throttled GPU, a shared switch or a link at half its width lies below this."""
WARM_UP, REPETITIONS = 2, 5
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
"""Rows and columns: enough to fill a device, few enough for some milliseconds."""
MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Size of a message: large enough that latency does not count."""
ROWS_SHOWN = 16
"""Number of ranks above which the table shows a summary and the slow ranks only."""

KINDS = {
    "matmul": "TFLOP/s",
    "all-reduce, tensor": "GB/s",
    "all-reduce, data": "GB/s",
    "to the next stage": "GB/s",
}
"""Measurements with their units. All-reduces count bus bandwidth: 2 (n - 1) / n * bytes / seconds for n ranks."""


@dataclass(frozen=True)
class RankReport:
    """Measurements of one rank; all-reduces over one rank are left out."""

    rank: int
    host: str
    device: str
    values: dict[str, float]
    groups: dict[str, list[int]]
    """Participating ranks, by measurement."""


@dataclass(frozen=True)
class SlowGroup:
    """A group of ranks with a measurement below SLOW times the median of its peers."""

    kind: str
    ranks: list[int]
    hosts: list[str]
    value: float
    median: float

    def __str__(self) -> str:
        who = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {', '.join(map(str, self.ranks))}"
        return (
            f"preflight: {who} ({', '.join(self.hosts)}): {self.kind} {self.value:.3g} {KINDS[self.kind]}, "
            f"{self.value / self.median:.0%} of the median {self.median:.3g}"
        )


def find_slow(reports: Sequence[RankReport]) -> list[SlowGroup]:
    """Return the ranks, groups and links below SLOW times the median of their peers, in the order of KINDS.

    A group is as fast as its slowest member reports. Peers are groups on the same number of hosts: a link within a
    machine cannot be compared with one between two.
    """
    hosts = {report.rank: report.host for report in reports}
    measured: dict[tuple[str, int], dict[tuple[int, ...], float]] = defaultdict(dict)
    for report in reports:
        for kind, value in report.values.items():
            ranks = tuple(report.groups[kind])
            peers = measured[kind, len({hosts[rank] for rank in ranks})]
            peers[ranks] = min(value, peers.get(ranks, value))
    slow = []
    for kind, spread in sorted(measured, key=lambda key: (list(KINDS).index(key[0]), key[1])):
        peers = measured[kind, spread]
        median = statistics.median(peers.values())
        slow += [
            SlowGroup(kind, list(ranks), sorted({hosts[rank] for rank in ranks}), value, median)
            for ranks, value in sorted(peers.items())
            if value < SLOW * median
        ]
    return slow


def run_preflight(config: Config, topology: Topology, gloo_group: dist.ProcessGroup) -> None:
    """Measure every rank; rank 0 prints, writes and logs the result. All ranks call it; a slow rank is not an error."""
    reports = all_gather_objects(measure(config, topology), gloo_group)
    if topology.rank:
        return
    slow = find_slow(reports)
    print_reports(reports, slow, Console())
    write_reports(config.output_dir / PREFLIGHT, reports, slow)
    for found in slow:
        logger.info("%s", found, extra={"event": "note"})
    if not slow:
        logger.info(
            "preflight: no rank, group or link is below %d%% of the median of its peers",
            round(100 * SLOW),
            extra={"event": "note"},
        )


def measure(config: Config, topology: Topology) -> RankReport:
    """Return this rank's report. All ranks call it and measure the same at the same time, as in training."""
    device, rank = topology.device, topology.rank
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    values, groups = {"matmul": matmul_rate(device, dtype)}, {"matmul": [rank]}
    message = torch.zeros(MESSAGE_BYTES[device.type] // dtype.itemsize, dtype=dtype, device=device)
    for axis, group in (("tensor", tp_group()), ("data", dp_group())):
        if group.size() > 1:
            groups[f"all-reduce, {axis}"] = dist.get_process_group_ranks(group)
            values[f"all-reduce, {axis}"] = all_reduce_rate(message, group)
    stage_ranks = topology.tp_size * topology.dp_size
    for stage in range(topology.pp_size - 1):  # one link after the other
        dist.barrier()
        if topology.pp_rank == stage:
            groups["to the next stage"] = [rank, rank + stage_ranks]
            values["to the next stage"] = round_trip_rate(message, rank + stage_ranks)
        elif topology.pp_rank == stage + 1:
            answer_round_trips(message, rank - stage_ranks)
    del message
    if device.type == "cuda":
        torch.cuda.empty_cache()  # training's tensors have other sizes
    return RankReport(rank, socket.gethostname(), device_name(device), values, groups)


def median_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the median duration of a call, after WARM_UP calls."""
    seconds = []
    for repetition in range(WARM_UP + REPETITIONS):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        if repetition >= WARM_UP:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large matmul."""
    size = MATMUL_SIZE[device.type]
    # Random numbers: with equal ones a device needs so little power that it never throttles.
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / median_seconds(lambda: torch.matmul(left, right, out=product), device) / 1e12


def all_reduce_rate(message: Tensor, group: dist.ProcessGroup) -> float:
    """Return the bus bandwidth of an all-reduce in GB/s, which does not depend on the group's size."""
    dist.barrier(group)
    seconds = median_seconds(lambda: dist.all_reduce(message, group=group), message.device)
    return 2 * (group.size() - 1) / group.size() * message.nbytes / seconds / 1e9


def round_trip_rate(message: Tensor, other: int) -> float:
    """Return the GB/s of sending a message to rank `other` and back; that rank calls `answer_round_trips`."""

    def round_trip() -> None:
        dist.send(message, other)
        dist.recv(message, other)

    return 2 * message.nbytes / median_seconds(round_trip, message.device) / 1e9


def answer_round_trips(message: Tensor, other: int) -> None:
    for _ in range(WARM_UP + REPETITIONS):
        dist.recv(message, other)
        dist.send(message, other)


def print_reports(reports: Sequence[RankReport], slow: Sequence[SlowGroup], console: Console) -> None:
    """Print a row per rank; of many ranks the smallest, median and largest values, and the slow ranks."""
    kinds = [kind for kind in KINDS if any(kind in report.values for report in reports)]
    table = Table(title="Preflight")
    for column in ("rank", "host", "device", *(f"{kind} {KINDS[kind]}" for kind in kinds)):
        table.add_column(column, justify="left" if column in ("host", "device") else "right")
    shown = reports
    if len(reports) > ROWS_SHOWN:
        named = {rank for found in slow for rank in found.ranks}
        shown = [report for report in reports if report.rank in named]
        columns = [[report.values[kind] for report in reports if kind in report.values] for kind in kinds]
        for label, summary in (("smallest", min), ("median", statistics.median), ("largest", max)):
            table.add_row(label, "", "", *(f"{summary(values):.3g}" for values in columns))
        table.add_section()
    for report in shown:
        cells = (f"{report.values[kind]:.3g}" if kind in report.values else "" for kind in kinds)
        table.add_row(str(report.rank), report.host, report.device, *cells)
    console.print(table)


def write_reports(file: Path, reports: Sequence[RankReport], slow: Sequence[SlowGroup]) -> None:
    """Write `preflight.json`."""
    content = {
        "units": KINDS,
        "slow_below": SLOW,
        "slow": [asdict(found) for found in slow],
        "ranks": [asdict(report) for report in reports],
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
