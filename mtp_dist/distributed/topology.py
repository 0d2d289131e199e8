"""The three axes of parallelism and this rank's place on them.

Ranks count tensor fastest, then data, then pipeline: the ranks of one tensor-parallel group are neighbours on a node,
and the stages, which talk least, lie furthest apart. Megatron-core's groups and DeepSpeed's topology both use it.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mtp_dist.config import Config
from mtp_dist.distributed.environment import describe_rank
from mtp_dist.distributed.flight_recorder import enable_flight_recorder
from mtp_dist.distributed.rendezvous import join
from mtp_dist.distributed.sockets import choose_gloo_interface, raise_open_files_limit
from mtp_dist.distributed.threads import set_threads

T = TypeVar("T")

COLLECTIVE_TIMEOUT_MARGIN = timedelta(minutes=10)


@dataclass(frozen=True)
class Topology:
    """Degrees of the axes and this rank's index on each."""

    tp_size: int
    pp_size: int
    dp_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    device: torch.device

    @property
    def degrees(self) -> dict[str, int]:
        """By axis, as logs and results have them."""
        return {"tensor": self.tp_size, "pipeline": self.pp_size, "data": self.dp_size}

    @property
    def reads_tokens(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.pp_rank == 0

    @property
    def holds_loss(self) -> bool:
        """Whether this rank has the heads and computes their losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def rank(self) -> int:
        return self.tp_rank + self.tp_size * (self.dp_rank + self.dp_size * self.pp_rank)

    def stage_of(self, rank: int) -> int:
        """Pipeline stage of any rank."""
        return rank // (self.tp_size * self.dp_size)


def initialize_topology(config: Config, device: torch.device) -> Topology:
    """Open the process group (unless it is open) and the groups of every axis."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    differs = set_threads()
    if differs and os.environ["RANK"] == "0":
        print(differs, file=sys.stderr, flush=True)
    if not dist.is_initialized():
        enable_flight_recorder()
        if os.environ["WORLD_SIZE"] == "1":
            # One process needs no rendezvous address, so any number of such runs can share a machine.
            dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        else:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            raise_open_files_limit(world_size)
            choose_gloo_interface(os.environ.get("MASTER_ADDR", ""))
            store = join(rank, world_size, config.run.join_timeout, describe_rank(config, device))
            store.set_timeout(
                _collective_timeout(config)
            )  # what the groups tell each other through it has nothing to do with joining
            dist.init_process_group(
                _backend(device), timeout=_collective_timeout(config), store=store, rank=rank, world_size=world_size
            )
    # On a CPU DeepSpeed would first compile a shared-memory collective that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    parallel_state.initialize_model_parallel(
        config.parallel.tensor,
        config.parallel.pipeline,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(_collective_timeout(config) / timedelta(minutes=1)),
    )
    topology = Topology(
        tp_size=config.parallel.tensor,
        pp_size=config.parallel.pipeline,
        dp_size=config.dp_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=device,
    )
    assert topology.rank == dist.get_rank()
    return topology


def _collective_timeout(config: Config) -> timedelta:
    """How long a collective waits for a rank: longer than the watchdog, which says where all of them are."""
    seconds = config.run.step_timeout
    return timedelta(days=1) if seconds is None else timedelta(seconds=seconds) + COLLECTIVE_TIMEOUT_MARGIN


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def tp_group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def dp_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group()


@dataclass(frozen=True)
class GlooGroups:
    """Ranks once more, over gloo: for what is in host memory, also while another thread trains."""

    all: dist.ProcessGroup
    tensor: dist.ProcessGroup
    """This rank's tensor-parallel group."""


def new_gloo_groups(topology: Topology) -> GlooGroups:
    # A rank that has written its files waits for the slowest one.
    patience = timedelta(days=1)
    tensor, _ = dist.new_subgroups(topology.tp_size, timeout=patience, backend="gloo")
    return GlooGroups(dist.new_group(backend="gloo", timeout=patience), tensor)


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, or of a group's, by rank, on every rank. They must survive pickling."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def close_topology() -> None:
    """Close every process group."""
    parallel_state.destroy_model_parallel()
    deepspeed.comm.destroy_process_group()


def all_gather_floats(values: Sequence[float], topology: Topology) -> list[list[float]]:
    """The values of all ranks, by rank, on every rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=topology.device)
    of_all = mine.new_empty(topology.world_size * len(values))
    dist.all_gather_into_tensor(of_all, mine)
    numbers: list[list[float]] = of_all.view(topology.world_size, -1).tolist()
    return numbers
