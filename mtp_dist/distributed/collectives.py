"""Collectives with plain Python values."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import UserError

T = TypeVar("T")


def from_rank_0(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Call `action` on rank 0 only and return its result, which must survive pickling, on every rank.

    A collective over `group`, all ranks. A UserError of the action is raised on every rank.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    result, rank_0_error = answer
    if rank_0_error is not None:
        raise rank_0_error
    return result


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks, or of a group's, by rank, on every rank. They must survive pickling."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def all_gather_floats(values: Sequence[float], topology: Topology) -> list[list[float]]:
    """Return the values of all ranks, by rank, on every rank."""
    local = torch.tensor(values, dtype=torch.float64, device=topology.device)
    gathered = local.new_empty(topology.world_size * len(values))
    dist.all_gather_into_tensor(gathered, local)
    return cast(list[list[float]], gathered.view(topology.world_size, -1).tolist())
