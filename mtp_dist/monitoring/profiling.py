"""Traces and memory snapshots of some steps of some ranks."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from mtp_dist.config import Config
from mtp_dist.errors import ConfigError
from mtp_dist.metrics import StepMetrics
from mtp_dist.monitoring.callback import Callback, StopReason

if TYPE_CHECKING:  # what it imports looks at the device, which is not chosen yet where the configuration is checked
    from mtp_dist.distributed.topology import Topology

PROFILE = "profile"
"""Folder in `run.output_dir`."""
PROFILE_FILES = ("rank_*_steps_*.json.gz", "unfinished_rank_*_steps_*.json.gz", "memory_rank_*.pickle")
"""Patterns of what is written there."""
SNAPSHOT_STEP = 2
"""After which memory is looked at where no steps are profiled: the first one allocates what later ones find."""
HISTORY_ENTRIES = 100_000
"""Allocations and frees that are remembered, with their stacks: some steps, and not the host's memory."""


def check_profile(config: Config, world_size: int, memory_snapshot: bool, device: torch.device) -> None:
    """Raise ConfigError for ranks that are not there, and for a memory snapshot where there is no GPU."""
    if (highest := max(config.log.profile_ranks)) >= world_size:
        raise ConfigError(
            f"log.profile_ranks = {list(config.log.profile_ranks)}: there is no rank {highest}, the {world_size} ranks "
            f"of this run are 0 to {world_size - 1}"
        )
    if memory_snapshot and device.type != "cuda":
        raise ConfigError("--memory-snapshot records what the GPU's allocator does, this run is on a CPU: leave it out")
    if memory_snapshot and config.log.profile_steps is None and config.train.steps < SNAPSHOT_STEP:
        raise ConfigError(
            f"--memory-snapshot looks at step {SNAPSHOT_STEP}, train.steps = {config.train.steps}: make more"
        )


def begin_memory_history(config: Config, rank: int) -> None:
    """Have CUDA's allocator remember where each block comes from; before the model is built, so that it is in it."""
    if rank in config.log.profile_ranks:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)


def profiling_callbacks(
    config: Config, topology: "Topology", memory_snapshot: bool, note: Callable[[str], None]
) -> list[Callback]:
    """What this rank records; `note` is told where its files are."""
    folder, steps, ranks = config.output_dir / PROFILE, config.log.profile_steps, config.log.profile_ranks
    callbacks: list[Callback] = []
    if steps and topology.rank in (0, *ranks):
        callbacks.append(StepProfiler(folder, steps, ranks, topology, note))
    if memory_snapshot and topology.rank in ranks:
        callbacks.append(MemorySnapshot(folder, steps[1] if steps else SNAPSHOT_STEP, topology.rank, note))
    return callbacks


class StepProfiler(Callback):
    """One trace of the steps first .. last, as far as they are made, for Perfetto and chrome://tracing.

    Rank 0 has one in any case, to say in the log what is traced.
    """

    def __init__(
        self,
        folder: Path,
        steps: tuple[int, int],
        ranks: Sequence[int],
        topology: "Topology",
        note: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._first, self._last = steps
        self._ranks = list(ranks)
        self._rank = topology.rank
        self._activities = [ProfilerActivity.CPU]
        if topology.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._note = note
        self._profiler: profile | None = None
        self._began = 0
        self._made = 0

    def on_start(self, completed_steps: int) -> None:
        self._made = completed_steps
        if self._rank == 0 and self._made < self._last:
            steps = f"{max(self._first, self._made + 1)}-{self._last}"
            self._note(f"profile: traces of steps {steps} on ranks {self._ranks} will be in {self._folder}")
        self._begin_where_due()

    def on_step(self, metrics: StepMetrics) -> None:
        self._made = metrics.step
        if self._made == self._last:
            self._finish()
        self._begin_where_due()

    def on_end(self, reason: StopReason | None) -> None:
        self._finish()  # of a run that ends before

    def _begin_where_due(self) -> None:
        """Before the next step."""
        if self._rank in self._ranks and self._profiler is None and self._first <= self._made + 1 <= self._last:
            # The profiler else prints lines of its own at each start and stop.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            self._profiler = profile(activities=self._activities)
            self._profiler.start()
            self._began = self._made + 1

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        if self._made < self._began:
            return
        file = self._folder / f"rank_{self._rank:05d}_steps_{self._began}-{self._made}.json.gz"
        unfinished = file.with_name(f"unfinished_{file.name}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(file)
        except OSError as error:  # training goes on without
            self._note(f"profile of rank {self._rank} is NOT written: {error}")
        else:
            self._note(f"profile of rank {self._rank}, steps {self._began}-{self._made}: {file}")


class MemorySnapshot(Callback):
    """What lies in the GPU's memory after a step, and where training runs out of it, for pytorch.org/memory_viz."""

    def __init__(self, folder: Path, step: int, rank: int, note: Callable[[str], None]) -> None:
        self._folder = folder
        self._step = step
        self._rank = rank
        self._note = note

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == self._step:
            self._write(f"after step {self._step}")

    def on_end(self, reason: StopReason | None) -> None:
        # The loop calls this while an exception passes through it, with all tensors of the failed step still alive.
        if isinstance(sys.exception(), torch.OutOfMemoryError):
            self._write("out of memory")
        if reason is not StopReason.SPIKE:  # after one the run goes on
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, when: str) -> None:
        file = self._folder / f"memory_rank_{self._rank:05d}.pickle"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))
        except OSError as error:
            self._note(f"memory snapshot of rank {self._rank} is NOT written: {error}")
        else:
            self._note(f"memory snapshot of rank {self._rank}, {when}: {file}")
