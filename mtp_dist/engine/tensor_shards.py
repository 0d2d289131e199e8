"""Full weights, gradients and moments from the shards of the ranks, for checkpoints and comparisons."""

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
    """Return the fp32 values of a weight of this rank: the optimizer's copy in bf16, the weight itself in fp32.

    A frozen weight has no copy: its bf16 values are converted. A collective over the data-parallel group.
    """
    master: Tensor | None = safe_get_full_fp32_param(weight)
    return weight.detach().float() if master is None else master


@torch.no_grad()
def full_tensors(
    stage: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    topology: Topology,
    read: Callable[[nn.Parameter], Tensor | None],
) -> Iterator[tuple[str, Tensor]]:
    """Yield this stage's full tensors one by one by global name, copied to the CPU, on every rank of the stage.

    read returns this rank's shard for one of its weights: its value, its gradient or a moment; None for a weight
    without one. A tied weight is yielded on its first stage only.
    """
    group = tp_group()
    for name, weight in named_weights(stage):
        values = read(weight)
        if values is None or is_tied_replica(weight):
            continue
        shard = values.contiguous()
        shards = [shard]
        if topology.tp_size > 1 and is_sharded(weight):
            shards = [torch.empty_like(shard) for _ in range(topology.tp_size)]
            dist.all_gather(shards, shard, group=group)
        yield name, _copy_to_cpu(unshard(shards, weight, shapes[name]))


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _writers(stage: nn.Module, shapes: dict[str, tuple[int, ...]], topology: Topology) -> dict[str, tuple[int, int]]:
    """Return the (data-parallel, tensor-parallel) rank that writes each weight of the stage, by global name.

    Each rank of a stage gets consecutive weights, of about the same total size.
    """
    sizes = {name: math.prod(shapes[name]) for name, weight in named_weights(stage) if not is_tied_replica(weight)}
    ranks, total = topology.tp_size * topology.dp_size, sum(sizes.values())
    middles = (end - size / 2 for end, size in zip(accumulate(sizes.values()), sizes.values(), strict=True))
    return {
        name: divmod(int(ranks * middle / total), topology.tp_size) for name, middle in zip(sizes, middles, strict=True)
    }


@dataclass(frozen=True)
class TensorShard:
    """A copy of this rank's shard of a tensor in host memory."""

    values: Tensor
    weight: nn.Parameter
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    writer: int
    """Tensor-parallel rank that writes the full tensor."""


@torch.no_grad()
def local_shards(
    stage: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    topology: Topology,
    read: Callable[[nn.Parameter], Tensor | None],
) -> dict[str, TensorShard]:
    """Return the shards that this rank contributes to its stage's files, by global name. read: see `full_tensors`."""
    writers = _writers(stage, shapes, topology)
    shards: dict[str, TensorShard] = {}
    for name, weight in named_weights(stage):
        values = read(weight)  # also if it is not needed here: it may be a collective
        if values is None or is_tied_replica(weight) or writers[name][0] != topology.dp_rank:
            continue
        writer = writers[name][1]
        if is_sharded(weight) or writer == topology.tp_rank:
            shards[name] = TensorShard(_copy_to_cpu(values), weight, shapes[name], writer)
    return shards


@torch.no_grad()
def gather_full_tensors(
    shards: dict[str, TensorShard], topology: Topology, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Return the full tensors that this rank writes. Empty `shards`, so that memory holds each tensor once.

    A collective over `group`, the ranks of the tensor-parallel group, with a backend for the CPU.
    """
    tensors: dict[str, Tensor] = {}
    for name in list(shards):
        shard = shards.pop(name)
        gathered = [shard.values]
        if topology.tp_size > 1 and is_sharded(shard.weight):
            is_writer = shard.writer == topology.tp_rank
            gathered = [torch.empty_like(shard.values) for _ in range(topology.tp_size)] if is_writer else []
            dist.gather(shard.values, gathered or None, group=group, group_dst=shard.writer)
        if gathered:
            tensors[name] = unshard(gathered, shard.weight, shard.shape).contiguous()
    return tensors


@contextmanager
def capture_first_gradients(engine: TrainingEngine, shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that the first step in this context fills with this stage's full gradients before clipping."""
    gradients: dict[str, Tensor] = {}

    def capture() -> None:
        if not gradients:
            gradients.update(full_tensors(engine.stage, shapes, engine.topology, reduced_gradient))

    with before_update(engine.pipeline, capture):
        yield gradients
