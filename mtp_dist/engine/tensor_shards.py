"""Whole weights and gradients from the parts that the ranks hold."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from mtp_dist.distributed.topology import Topology, tp_group
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.engine.gradients import before_update, is_tied_replica, reduced_gradient
from mtp_dist.model.parameters import named_weights
from mtp_dist.model.sharding import is_sharded, unshard


def master_weight(weight: nn.Parameter) -> Tensor:
    """The fp32 values behind a weight of this rank: the optimizer's copy in bf16, the weight itself in fp32.

    A collective over the data-parallel group.
    """
    master: Tensor | None = safe_get_full_fp32_param(weight)
    return weight.detach() if master is None else master


@torch.no_grad()
def full_tensors(
    stage: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    topology: Topology,
    local: Callable[[nn.Parameter], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield this stage's tensors one by one by global name, copied to the CPU, on every rank of the stage.

    local gives this rank's part for one of its weights: its value, its gradient or a moment. A tied weight comes from
    its first stage only.
    """
    group = tp_group()
    for name, weight in named_weights(stage):
        part = local(weight).contiguous()
        if is_tied_replica(weight):
            continue
        if topology.tp_size > 1 and is_sharded(weight):
            parts = [torch.empty_like(part) for _ in range(topology.tp_size)]
            dist.all_gather(parts, part, group=group)
        else:
            parts = [part]
        yield name, _copied(unshard(parts, weight, shapes[name]))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _owners(stage: nn.Module, shapes: dict[str, tuple[int, ...]], topology: Topology) -> dict[str, tuple[int, int]]:
    """The (data-parallel, tensor-parallel) rank that answers for each weight of the stage, by global name.

    The ranks of a stage each get a run of its weights, of about the same size.
    """
    sizes = {name: math.prod(shapes[name]) for name, weight in named_weights(stage) if not is_tied_replica(weight)}
    ranks, total = topology.tp_size * topology.dp_size, sum(sizes.values())
    middles = (end - size / 2 for end, size in zip(accumulate(sizes.values()), sizes.values(), strict=True))
    return {
        name: divmod(int(ranks * middle / total), topology.tp_size) for name, middle in zip(sizes, middles, strict=True)
    }


@dataclass(frozen=True)
class TensorShard:
    """A copy in host memory of what this rank has of a tensor."""

    values: Tensor
    weight: nn.Parameter
    shape: tuple[int, ...]
    """Of the whole tensor."""
    owner: int
    """The tensor-parallel rank that is to have the whole."""


@torch.no_grad()
def local_shards(
    stage: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    topology: Topology,
    local: Callable[[nn.Parameter], Tensor],
) -> dict[str, TensorShard]:
    """This rank's contribution to its stage's tensors, by global name. `local` is that of `full_tensors`."""
    owners = _owners(stage, shapes, topology)
    parts: dict[str, TensorShard] = {}
    for name, weight in named_weights(stage):
        values = local(weight)  # of every weight: it may be a collective
        if is_tied_replica(weight) or owners[name][0] != topology.dp_rank:
            continue
        owner = owners[name][1]
        if is_sharded(weight) or owner == topology.tp_rank:
            parts[name] = TensorShard(_copied(values), weight, shapes[name], owner)
    return parts


@torch.no_grad()
def gather_full_tensors(
    parts: dict[str, TensorShard], topology: Topology, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """The whole tensors that this rank answers for. Empties `parts`, so that memory holds each tensor once.

    A collective over `group`, the ranks of the tensor-parallel group, of a backend for the CPU.
    """
    wholes: dict[str, Tensor] = {}
    for name in list(parts):
        part = parts.pop(name)
        of_all = [part.values]
        if topology.tp_size > 1 and is_sharded(part.weight):
            mine = part.owner == topology.tp_rank
            of_all = [torch.empty_like(part.values) for _ in range(topology.tp_size)] if mine else []
            dist.gather(part.values, of_all or None, group=group, group_dst=part.owner)
        if of_all:
            wholes[name] = unshard(of_all, part.weight, part.shape).contiguous()
    return wholes


@contextmanager
def capture_first_gradients(engine: TrainingEngine, shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that the first step in this context fills: this stage's whole gradients before clipping."""
    gradients: dict[str, Tensor] = {}

    def look() -> None:
        if not gradients:
            gradients.update(full_tensors(engine.stage, shapes, engine.topology, reduced_gradient))

    with before_update(engine.pipeline, look):
        yield gradients
