"""Predicted and measured peak memory, FLOPs and processor time of training steps on every rank of small pipelines."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from mtp_dist.bench.plan_cases import BASE, CASES, Sections, merge_sections
from mtp_dist.bench.plan_time_cases import TIME_BASE, TIME_CASES
from mtp_dist.bench.plan_times import measure_times
from mtp_dist.bench.ranks import NewProgress, run_on_ranks
from mtp_dist.config import Config, build_config, resolve
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.launcher import env_rank, env_world_size
from mtp_dist.errors import LaunchError
from mtp_dist.monitoring.output import silence_import_warnings
from mtp_dist.planner.fit import pipeline_rank
from mtp_dist.planner.partition import pipeline_stages
from mtp_dist.planner.stage_cost import stage_cost
from mtp_dist.provenance import processor_name, usable_cores

if TYPE_CHECKING:
    from mtp_dist.distributed.topology import Topology

Row = dict[str, Any]
Quantity = Literal["memory", "times"]

_CASES: dict[Quantity, tuple[Sections, dict[str, tuple[int, Sections]]]] = {
    "memory": (BASE, CASES),
    "times": (TIME_BASE, TIME_CASES),
}
QUANTITIES = tuple(_CASES)
MEASURED_STEPS = 3
"""The smallest peak of these steps counts: gloo's threads may hold the tensors of a collective beyond its end."""
LARGE = 0.05
"""Part of the total from which on a component counts as large."""


def measure_plans(quantities: Sequence[Quantity], new_progress: NewProgress) -> dict[str, Any]:
    """Measure all cases on processes that this starts, those with the same number of ranks on the same ones.

    Raise LaunchError if a rank fails.
    """
    if env_world_size() > 1:
        raise LaunchError("WORLD_SIZE is above 1: start this benchmark as one process, it starts the ranks itself")
    machine = {"processor": processor_name(), "cores": usable_cores(), "torch": torch.__version__}
    return {"machine": machine} | {quantity: _measure_cases(quantity, new_progress) for quantity in quantities}


def _measure_cases(quantity: Quantity, new_progress: NewProgress) -> list[Row]:
    cases, rows = _CASES[quantity][1], dict[str, list[Row]]()
    for ranks in sorted({ranks for ranks, _ in cases.values()}):
        names = [name for name in cases if cases[name][0] == ranks]
        rows |= run_on_ranks(ranks, "plan", _measure_on_rank, quantity, names, len(rows), new_progress)
    return [row for name in cases for row in rows[name]]


def _measure_on_rank(
    quantity: Quantity, names: Sequence[str], done: int, new_progress: NewProgress
) -> dict[str, list[Row]]:
    """Return the rows of each case, on every rank. done: number of cases that are measured already."""
    silence_import_warnings()
    torch.set_num_threads(1)
    from mtp_dist.distributed.topology import close_axes, close_topology, initialize_topology

    measure: Callable[[str, Config, Topology], list[Row]]
    measure = measure_case if quantity == "memory" else measure_times
    rows: dict[str, list[Row]] = {}
    with new_progress(env_rank() == 0) as progress:
        task = progress.add_task(quantity, total=len(_CASES[quantity][1]), completed=done)
        for name in names:
            config = case_config(name, quantity)
            rows[name] = measure(name, config, initialize_topology(config, select_device(config)))
            close_axes()
            progress.advance(task)
    close_topology()
    return rows


def case_config(name: str, quantity: Quantity = "memory") -> Config:
    base, cases = _CASES[quantity]
    ranks, sections = cases[name]
    config = build_config(merge_sections(base, sections))
    return resolve(config, config.vocab_size, ranks)


def measure_case(name: str, config: Config, topology: Topology) -> list[Row]:
    """Return a row per pipeline rank: predicted and measured bytes by component, and FLOPs of a micro-batch.

    Of tensor- and data-parallel ranks those with the most bytes count. A collective over all ranks.
    """
    from mtp_dist.engine.engine import build_engine
    from mtp_dist.engine.memory_tracker import Component, track_memory
    from mtp_dist.engine.optimizer import learning_rate
    from mtp_dist.loss.schedule import head_schedule
    from mtp_dist.verify.reference_training import local_batch, random_batch

    before = _resident_bytes("VmRSS")
    _reset_peak()
    engine = build_engine(config, topology)
    batch = local_batch(config, topology, *random_batch(config))
    engine.train_step(batch, 1, learning_rate(config, 1), head_schedule(config, 1))  # which makes the moments
    peaks = []
    for step in range(2, 2 + MEASURED_STEPS):
        gc.collect()  # so that the collector, which frees tensors too, runs at the same points of the step each time
        with track_memory(engine) as tracker:
            engine.train_step(batch, step, learning_rate(config, step), head_schedule(config, step))
        peaks.append({component.value: peak for component, peak in tracker.peaks.items()} | {"total": tracker.total})
    measured = {name: min(step[name] for step in peaks) for name in peaks[0]}
    resident = _resident_bytes("VmHWM") - before
    flops = [
        tracker.flops[component] / config.micro_batches for component in (Component.ACTIVATIONS, Component.WORKSPACE)
    ]
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, (topology.pp_rank, measured, flops, resident))
    rows = []
    for rank in range(topology.pp_size):
        ranks = [others for pp_rank, *others in gathered if pp_rank == rank]
        most = {name: max(measured[name] for measured, _, _ in ranks) for name in measured}
        rows.append(row_of(name, config, rank, most, ranks[0][1], max(resident for _, _, resident in ranks)))
    return rows


def row_of(name: str, config: Config, rank: int, measured: dict[str, int], flops: list[float], resident: int) -> Row:
    """Return what is predicted next to what was measured, on a pipeline rank."""
    split = pipeline_stages(config)
    predicted = asdict(pipeline_rank(config, split, rank, "cpu").memory)
    # What the heads' loss allocates and what a layer's backward pass does cannot be told apart.
    predicted["workspace"] = max(predicted["workspace"], predicted.pop("head_loss"))
    measured = {component: measured[component] for component in predicted}
    costs = [stage_cost(config, stage, *split[stage]) for stage in config.parallel.rank_stages(rank)]
    return {
        "case": name,
        "ranks": config.parallel.pipeline,
        "rank": rank,
        "predicted": predicted,
        "measured": measured,
        "error": largest_error(predicted, measured),
        "predicted_flops": [
            sum(cost.forward_flops for cost in costs),
            sum(cost.backward_flops for cost in costs),
        ],
        "measured_flops": flops,
        "resident": resident,
    }


def largest_error(predicted: dict[str, int], measured: dict[str, int]) -> float:
    """Return the largest relative error of the total and of each component that is a large part of it."""
    large = LARGE * measured["total"]
    return max(
        abs(predicted[name] / measured[name] - 1) if measured[name] else float("inf")
        for name in predicted
        if max(predicted[name], measured[name]) > large
    )


def _resident_bytes(field: str) -> int:
    """Return the process's resident memory, VmRSS, or its peak, VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/self/status")


def _reset_peak() -> None:
    """Let VmHWM begin again at the resident memory of now, if the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
