"""The three axes of parallelism, this rank's position on them, and their process groups.

Tensor rank varies fastest, then data, then pipeline: the ranks of one tensor-parallel group are neighbours on a node,
and the stages, which exchange least, are furthest apart. Megatron-core's groups and DeepSpeed's topology both use this
order.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mtp_dist.config import Config
from mtp_dist.distributed.environment import describe_rank
from mtp_dist.distributed.flight_recorder import enable_flight_recorder
from mtp_dist.distributed.launcher import env_rank, env_world_size
from mtp_dist.distributed.rendezvous import join
from mtp_dist.distributed.sockets import choose_gloo_interface, raise_open_files_limit
from mtp_dist.distributed.threads import set_threads

logger = logging.getLogger(__name__)

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
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """Pipeline schedule, which decides where the last stage is."""
    head_stages: int = 1
    """Number of last stages that have heads."""

    @property
    def degrees(self) -> dict[str, int]:
        """Degree per axis, for logs and results."""
        return {"tensor": self.tp_size, "pipeline": self.pp_size, "data": self.dp_size}

    @cached_property
    def reads_tokens(self) -> bool:
        """True if this rank embeds the tokens."""
        return self.pp_rank == 0

    @cached_property
    def holds_loss(self) -> bool:
        """True if this rank has heads and computes their losses."""
        if self.schedule == "dualpipev":
            return self.pp_rank == 0
        return self.pp_rank >= self.pp_size - self.head_stages

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def rank(self) -> int:
        return self.tp_rank + self.tp_size * (self.dp_rank + self.dp_size * self.pp_rank)

    def pipeline_stage(self, rank: int) -> int:
        """Return the first pipeline stage of a rank; `dualpipev` has two."""
        return rank // (self.tp_size * self.dp_size)


def initialize_topology(config: Config, device: torch.device) -> Topology:
    """Open the process group, unless it is open, and the groups of every axis."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(key, value)
    if notice := set_threads():
        logger.warning(notice)
    if not dist.is_initialized():
        _open_process_group(config, device)
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
        schedule=config.parallel.schedule,
        head_stages=config.heads.stages,
    )
    assert topology.rank == dist.get_rank()
    return topology


def _open_process_group(config: Config, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    enable_flight_recorder()
    rank, world_size = env_rank(), env_world_size()
    if world_size == 1:
        # One process needs no rendezvous address, so any number of such runs can share a machine.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return
    raise_open_files_limit(world_size)
    choose_gloo_interface(os.environ.get("MASTER_ADDR", ""))
    store = join(rank, world_size, config.run.join_timeout, describe_rank(config, device))
    timeout = _collective_timeout(config)
    store.set_timeout(timeout)  # join_timeout is not meant for what the groups exchange through it later
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)


def _collective_timeout(config: Config) -> timedelta:
    """Return how long a collective waits for a rank: longer than the watchdog, which reports where all ranks are."""
    seconds = config.run.step_timeout
    return timedelta(days=1) if seconds is None else timedelta(seconds=seconds) + COLLECTIVE_TIMEOUT_MARGIN


def close_topology() -> None:
    """Close every process group."""
    close_axes()
    dist.destroy_process_group()


def close_axes() -> None:
    """Close the groups of the axes, so that this process can open another layout."""
    parallel_state.destroy_model_parallel()


def tp_group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def dp_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group()


@dataclass(frozen=True)
class GlooGroups:
    """Gloo process groups for host tensors, for use also by a background thread during training."""

    all: dist.ProcessGroup
    tensor: dist.ProcessGroup
    """This rank's tensor-parallel group."""


def new_gloo_groups(topology: Topology) -> GlooGroups:
    timeout = timedelta(days=1)  # a rank that has written its files waits for the slowest one
    tensor, _ = dist.new_subgroups(topology.tp_size, timeout=timeout, backend="gloo")
    return GlooGroups(dist.new_group(backend="gloo", timeout=timeout), tensor)
