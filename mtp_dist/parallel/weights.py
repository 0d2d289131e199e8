"""Whole weights and gradients from the parts that the ranks hold."""

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from mtp_dist.model.weights import is_cut, join, named_weights
from mtp_dist.parallel.engine import TrainingEngine
from mtp_dist.parallel.gradients import before_update, reduced_gradient
from mtp_dist.parallel.topology import Topology, tensor_group


def master_weight(weight: nn.Parameter) -> Tensor:
    """The fp32 values behind a weight of this rank: the optimizer's copy in bf16, the weight itself in fp32.

    A collective over the data-parallel group.
    """
    master: Tensor | None = safe_get_full_fp32_param(weight)
    return weight.detach() if master is None else master


@torch.no_grad()
def whole_tensors(
    stage: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    topology: Topology,
    local: Callable[[nn.Parameter], Tensor],
    names: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield this stage's tensors one by one by global name, copied to the CPU; every rank of the stage takes part.

    local gives this rank's part for one of its weights: its value, its gradient or a moment. names: those that this
    rank wants, all when None. A tied weight comes from its first stage only.
    """
    group = tensor_group()
    for name, weight in named_weights(stage):
        part = local(weight).contiguous()
        if _is_copy(weight):
            continue
        if topology.tensor > 1 and is_cut(weight):
            parts = [torch.empty_like(part) for _ in range(topology.tensor)]
            dist.all_gather(parts, part, group=group)
        else:
            parts = [part]
        if names is None or name in names:
            whole = join(parts, weight, shapes[name])
            yield name, whole.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _is_copy(weight: nn.Parameter) -> bool:
    """Whether this is a tied weight on a stage after its first."""
    return getattr(weight, "ds_pipe_replicated", False)


def owned_weights(stage: nn.Module, shapes: dict[str, tuple[int, ...]], topology: Topology) -> set[str]:
    """Global names of the weights that this rank answers for: each one in the model has one rank.

    The tensor- and data-parallel ranks of a stage each get a run of its weights, of about the same size.
    """
    sizes = {name: math.prod(shapes[name]) for name, weight in named_weights(stage) if not _is_copy(weight)}
    ranks = topology.tensor * topology.data
    rank = topology.tensor_rank + topology.tensor * topology.data_rank
    ends = accumulate(sizes.values())
    total = sum(sizes.values())
    middles = (end - size / 2 for end, size in zip(ends, sizes.values(), strict=True))
    return {name for name, middle in zip(sizes, middles, strict=True) if int(ranks * middle / total) == rank}


@contextmanager
def first_gradients(engine: TrainingEngine, shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that the first step in this context fills: this stage's whole gradients before clipping."""
    gradients: dict[str, Tensor] = {}

    def look() -> None:
        if not gradients:
            gradients.update(whole_tensors(engine.stage, shapes, engine.topology, reduced_gradient))

    with before_update(engine.pipeline, look):
        yield gradients
