"""Gradients of a step: their norms, overall and by module, clipping, and where one is not finite."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from mtp_dist.distributed.collectives import all_gather_objects
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.hooks import RunInstruction, hook_instruction
from mtp_dist.engine.pipeline_module import MultiTokenPipeline
from mtp_dist.model.parameters import named_weights
from mtp_dist.model.sharding import is_sharded


def is_tied_replica(weight: nn.Parameter) -> bool:
    """Whether this is a tied weight on a stage after its first."""
    return getattr(weight, "ds_pipe_replicated", False)


def counts(weight: nn.Parameter, tp_rank: int) -> bool:
    """Whether a norm over all ranks has this rank's part of a weight in it, so that every weight is in it once.

    Replicated weights are on tensor-parallel rank 0, tied ones on their first stage.
    """
    return (tp_rank == 0 or is_sharded(weight)) and not is_tied_replica(weight)


def clip_by_global_norm(parameters: Iterable[nn.Parameter], engine: PipelineEngine) -> Tensor:
    """Scale the gradients in place to the engine's `gradient_clipping`; return their global norm before.

    A norm that is not finite drops all gradients, so that the step changes nothing.

    For fp32 without ZeRO, where DeepSpeed 0.19.8 counts replicated weights on the first stage only and tied weights
    twice. Here every weight counts once, see `counts`.
    """
    gradients = {weight: weight.grad for weight in parameters if weight.grad is not None}
    squared = torch.zeros((), dtype=torch.float64, device=engine.device)
    for weight, gradient in gradients.items():
        if counts(weight, engine.grid.get_slice_parallel_rank()):
            squared += gradient.double().pow(2).sum()
    dist.all_reduce(squared, group=engine.grid.get_model_parallel_group())
    norm = squared.sqrt()
    if not norm.isfinite():
        # As DeepSpeed's other optimizers do: no update. A weight without a gradient is left alone, decay included.
        for weight in gradients:
            weight.grad = None
        return norm
    scale = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(scale.to(gradient.dtype))
    return norm


@contextmanager
def before_update(engine: PipelineEngine, look: Callable[[], None]) -> Iterator[None]:
    """Within this context, call `look` in every step after the gradients are reduced and before they are used."""
    take_step = engine._take_model_step

    def look_and_take_step(*args: object, **kwargs: object) -> None:
        look()
        take_step(*args, **kwargs)

    engine._take_model_step = look_and_take_step
    try:
        yield
    finally:
        engine._take_model_step = take_step


def reduced_gradient(weight: nn.Parameter) -> Tensor:
    """This rank's gradient of the global batch in fp32, whole over the data-parallel ranks, whatever the optimizer."""
    gradient: Tensor = safe_get_full_grad(weight)
    return gradient


@dataclass(frozen=True)
class NonFiniteGradient:
    """Where a gradient that is not finite came from; its text is a sentence's part for the user."""

    rank: int | None
    """The first, of the last stage that has one, as gradients flow from there to the first; None where only the sum
    over the ranks overflowed."""
    stage: int = 0
    weight: str | None = None
    """Global name of its first weight; None where only a loss is not finite."""
    losses: tuple[int, ...] = ()
    """Heads whose loss is not finite on that rank."""

    def __str__(self) -> str:
        if self.rank is None:
            return "that of every rank is finite, their sum is not"
        found = [f"the gradient of {self.weight}"] if self.weight else []
        if self.losses:
            found.append(f"the loss of head {', '.join(map(str, self.losses))}")
        return f"first on rank {self.rank} (stage {self.stage}): {' and '.join(found)}"


def module_group(name: str) -> str:
    """The part of the model that a weight's global name belongs to, such as `head_2`."""
    if match := re.match(r"(?:heads|unembeddings)\.(\d+)\.", name):
        return f"head_{match[1]}"
    if name.startswith("heads.repeated."):
        return "repeated_head"
    return "trunk" if name.startswith("trunk.") else "shared"


class GradientMonitor:
    """Looks at the gradients before the data-parallel ranks sum them, and again before the update."""

    def __init__(
        self, pipeline: PipelineEngine, stage: MultiTokenPipeline, topology: Topology, parts: tuple[str, ...]
    ) -> None:
        """parts: what `module_group` gives for the weights of the whole model."""
        self._stage = stage
        self._topology = topology
        self.modules = parts
        self._weights = {name: weight for name, weight in named_weights(stage) if weight.requires_grad}
        self._parts = {name: parts.index(module_group(name)) for name in self._weights}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._local: dict[str, Tensor] = {}
        self.squared_norms = torch.zeros(len(parts), dtype=torch.float64, device=topology.device)
        """Squared norm of this rank's share of the last step's gradient, before clipping, by part; their sum over all
        ranks is that of the whole gradient."""
        self.fault = torch.zeros((), dtype=torch.float64, device=topology.device)
        """0, or NaN if a gradient that this rank's optimizer reads in the last step is not finite."""
        self._counted: Tensor | None = None
        hook_instruction(pipeline, schedule.ReduceTiedGrads, self._look_before_reduction)
        hook_instruction(pipeline, schedule.OptimizerStep, self._look_before_update)

    @torch.no_grad()
    def _look_before_reduction(self, execute: RunInstruction) -> None:
        gradients = {
            name: gradient
            for name, weight in self._weights.items()
            if (gradient := _local_gradient(weight)) is not None
        }
        self._local = dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))
        execute()

    @torch.no_grad()
    def _look_before_update(self, execute: RunInstruction) -> None:
        gradients = {
            name: gradient
            for name, weight in self._weights.items()
            if (gradient := _reduced_gradient(weight)) is not None
        }
        norms = dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))
        self.squared_norms.zero_()
        if owned := [name for name in gradients if self._owns(self._weights[name])]:
            squares = torch.stack([norms[name] for name in owned]).double().square()
            self.squared_norms.index_add_(0, self._index(tuple(self._parts[name] for name in owned)), squares)
        if norms:
            self.fault = 0 * torch.stack(list(norms.values())).double().sum()
        counted = (name for name in gradients if counts(self._weights[name], self._topology.tp_rank))
        self._counted = next((gradients[name] for name in counted), None)
        execute()

    @torch.no_grad()
    def add_fault(self, fault: Tensor) -> None:
        """Add the fault that all ranks have found to one element of a gradient whose norm decides about the update.

        If it is NaN, the optimizers of all ranks drop the step by their own rules, which look at one replica of the
        model only, and the device is not asked in between. To be called before the update.
        """
        if self._counted is not None:
            self._counted[(0,) * self._counted.dim()] += fault

    def _index(self, parts: tuple[int, ...]) -> Tensor:
        # Made once: a copy to the GPU waits for all that it has to do before.
        if parts not in self._indices:
            self._indices[parts] = torch.tensor(parts, device=self._topology.device)
        return self._indices[parts]

    def _owns(self, weight: nn.Parameter) -> bool:
        """Return whether this rank answers for what it has of a reduced gradient: each element is one rank's only."""
        is_replicated = _is_whole(weight) and self._topology.dp_rank > 0
        return counts(weight, self._topology.tp_rank) and not is_replicated

    def find_non_finite(self) -> NonFiniteGradient:
        """Where the last step's gradient was not finite. A collective over all ranks."""
        weights = [name for name, norm in reversed(self._local.items()) if not norm.isfinite()]
        # What all heads share is not finite either where one head's are not.
        own = [name for name in weights if module_group(name) != "shared"]
        weight = next(iter(own or weights), None)
        losses: tuple[int, ...] = ()
        if self._topology.holds_loss:
            of_heads = self._stage.heads.sums.heads.cross_entropy.isfinite().tolist()
            losses = tuple(head for head, finite in enumerate(of_heads, 1) if not finite)
        topology = self._topology
        mine = NonFiniteGradient(topology.rank, topology.pp_rank, weight, losses) if weight or losses else None
        found = [of_rank for of_rank in all_gather_objects(mine) if of_rank]
        last_stage = max((of_rank.stage for of_rank in found), default=0)
        return next((of_rank for of_rank in found if of_rank.stage == last_stage), NonFiniteGradient(None))


def _local_gradient(weight: nn.Parameter) -> Tensor | None:
    """Of this rank's micro-batches; in bf16 it is summed in fp32."""
    gradient: Tensor | None = getattr(weight, "_hp_grad", None)
    return weight.grad if gradient is None else gradient


def _is_whole(weight: nn.Parameter) -> bool:
    """Return whether each data-parallel rank has the whole of the weight's reduced gradient: not under ZeRO."""
    return not hasattr(weight, "_hp_mapping") or hasattr(weight, "_hp_grad")


def _reduced_gradient(weight: nn.Parameter) -> Tensor | None:
    """Return what this rank's optimizer reads of the weight's gradient; None if that is nothing."""
    if _is_whole(weight):
        return _local_gradient(weight)
    mapping: Any = weight._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    fragment: Tensor = mapping.get_lp_grad_fragment(weight._index_in_param_group)  # type: ignore[attr-defined]
    return fragment
