"""Traces and memory snapshots of selected steps and ranks."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from mtp_dist.config import Config
from mtp_dist.errors import ConfigError, LaunchError
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback, StopReason

if TYPE_CHECKING:  # its imports probe the device, which is not selected yet when the configuration is checked
    from mtp_dist.distributed.topology import Topology

logger = logging.getLogger(__name__)

PROFILE = "profile"
"""Folder in `run.output_dir`."""
PROFILE_FILES = ("rank_*_steps_*.json.gz", "unfinished_rank_*_steps_*.json.gz", "memory_rank_*.pickle")
"""Patterns of the files in that folder."""
SNAPSHOT_STEP = 2
"""Step after which memory is recorded if no steps are profiled: the first one allocates what later ones reuse."""
HISTORY_ENTRIES = 100_000
"""Number of allocations and frees kept with their stacks: enough for some steps, little of the host's memory."""

EVENT = {"event": "note", "all_ranks": True}
"""Attributes of this module's log records."""


def check_profile(config: Config, world_size: int, memory_snapshot: bool, device: torch.device) -> None:
    """Raise UserError for ranks that do not exist, and for a memory snapshot without a GPU or after the last step."""
    if (highest := max(config.log.profile_ranks)) >= world_size:
        raise ConfigError(
            f"log.profile_ranks = {list(config.log.profile_ranks)}: there is no rank {highest}, the {world_size} ranks "
            f"of this run are 0 to {world_size - 1}"
        )
    if memory_snapshot and device.type != "cuda":
        raise LaunchError("--memory-snapshot records the GPU's allocator, and this run is on a CPU: leave it out")
    if memory_snapshot and config.log.profile_steps is None and config.train.steps < SNAPSHOT_STEP:
        raise LaunchError(
            f"--memory-snapshot is taken after step {SNAPSHOT_STEP}, but train.steps = {config.train.steps}: raise it"
        )


def begin_memory_history(config: Config, rank: int) -> None:
    """Record the origin of each CUDA allocation from now on. Call it before the model is built, to include it."""
    if rank in config.log.profile_ranks:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)


def profiling_callbacks(config: Config, topology: "Topology", memory_snapshot: bool) -> list[Callback]:
    """Return the callbacks that record this rank."""
    folder, steps, ranks = config.output_dir / PROFILE, config.log.profile_steps, config.log.profile_ranks
    callbacks: list[Callback] = []
    if steps and topology.rank in (0, *ranks):
        callbacks.append(StepProfiler(folder, steps, ranks, topology))
    if memory_snapshot and topology.rank in ranks:
        callbacks.append(MemorySnapshot(folder, steps[1] if steps else SNAPSHOT_STEP, topology.rank))
    return callbacks


class StepProfiler(Callback):
    """Callback that writes a trace of the steps first .. last, as far as they are run, for Perfetto.

    Rank 0 always has one, which logs what is traced.
    """

    def __init__(self, folder: Path, steps: tuple[int, int], ranks: Sequence[int], topology: "Topology") -> None:
        self._folder = folder
        self._first, self._last = steps
        self._ranks = list(ranks)
        self._rank = topology.rank
        self._activities = [ProfilerActivity.CPU]
        if topology.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None
        self._first_traced = 0
        self._completed_steps = 0

    def on_start(self, completed_steps: int) -> None:
        self._completed_steps = completed_steps
        if self._rank == 0 and completed_steps < self._last:
            steps = f"{max(self._first, completed_steps + 1)}-{self._last}"
            logger.info(
                "profile: traces of steps %s on ranks %s will be in %s", steps, self._ranks, self._folder, extra=EVENT
            )
        self._start_if_due()

    def on_step(self, metrics: StepMetrics) -> None:
        self._completed_steps = metrics.step
        if metrics.step == self._last:
            self._finish()
        self._start_if_due()

    def on_rollback(self, completed_steps: int) -> None:
        self._finish()
        self._completed_steps = completed_steps
        self._start_if_due()

    def on_end(self, reason: StopReason | None) -> None:
        self._finish()  # if the run ends before the last step to trace

    def _start_if_due(self) -> None:
        """Start the profiler if the next step is to be traced."""
        is_due = self._first <= self._completed_steps + 1 <= self._last
        if self._rank in self._ranks and self._profiler is None and is_due:
            # Otherwise the profiler prints lines of its own at each start and stop.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            self._profiler = profile(activities=self._activities)
            self._profiler.start()
            self._first_traced = self._completed_steps + 1

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        if self._completed_steps < self._first_traced:
            return
        steps = f"{self._first_traced}-{self._completed_steps}"
        file = self._folder / f"rank_{self._rank:05d}_steps_{steps}.json.gz"
        unfinished = file.with_name(f"unfinished_{file.name}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(file)
        except OSError as error:  # training does not depend on it
            logger.warning("profile of rank %d is NOT written: %s", self._rank, error, extra=EVENT)
        else:
            logger.info("profile of rank %d, steps %s: %s", self._rank, steps, file, extra=EVENT)


class MemorySnapshot(Callback):
    """Callback that writes GPU memory's contents after a step, and when it runs out, for pytorch.org/memory_viz."""

    def __init__(self, folder: Path, step: int, rank: int) -> None:
        self._folder = folder
        self._step = step
        self._rank = rank

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == self._step:
            self._write(f"after step {self._step}")

    def on_end(self, reason: StopReason | None) -> None:
        # The trainer calls this while an exception passes through it: the tensors of the failed step still exist.
        if isinstance(sys.exception(), torch.OutOfMemoryError):
            self._write("out of memory")
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, moment: str) -> None:
        file = self._folder / f"memory_rank_{self._rank:05d}.pickle"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))
        except OSError as error:
            logger.warning("memory snapshot of rank %d is NOT written: %s", self._rank, error, extra=EVENT)
        else:
            logger.info("memory snapshot of rank %d, %s: %s", self._rank, moment, file, extra=EVENT)
