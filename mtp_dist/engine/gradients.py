"""Gradients of a step: their norms, overall and by module, clipping, and where one is not finite."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

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
    """Return whether this is a tied weight on a stage after its first."""
    return getattr(weight, "ds_pipe_replicated", False)


def owns_param_for_norm(weight: nn.Parameter, tp_rank: int) -> bool:
    """Return whether this rank adds its shard of a weight to a norm over all ranks, so that each weight counts once.

    Replicated weights count on tensor-parallel rank 0, tied ones on their first stage.
    """
    return (tp_rank == 0 or is_sharded(weight)) and not is_tied_replica(weight)


def clip_by_global_norm(parameters: Iterable[nn.Parameter], engine: PipelineEngine) -> Tensor:
    """Scale the gradients in place to the engine's `gradient_clipping`; return their global norm before.

    If the norm is not finite, drop all gradients, so that the step changes nothing.

    For fp32 without ZeRO, where DeepSpeed 0.19.8 counts replicated weights on the first stage only and tied weights
    twice.
    """
    gradients = {weight: weight.grad for weight in parameters if weight.grad is not None}
    squared = torch.zeros((), dtype=torch.float64, device=engine.device)
    for weight, gradient in gradients.items():
        if owns_param_for_norm(weight, engine.grid.get_slice_parallel_rank()):
            squared += gradient.double().pow(2).sum()
    dist.all_reduce(squared, group=engine.grid.get_model_parallel_group())
    norm = squared.sqrt()
    if not norm.isfinite():
        # Like DeepSpeed's other optimizers: no update, and no weight decay either.
        for weight in gradients:
            weight.grad = None
        return norm
    scale = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(scale.to(gradient.dtype))
    return norm


@contextmanager
def before_update(engine: PipelineEngine, inspect: Callable[[], None]) -> Iterator[None]:
    """Call `inspect` in every step of this context, after the gradients are reduced and before they are used."""
    take_step = engine._take_model_step

    def inspect_and_take_step(*args: object, **kwargs: object) -> None:
        inspect()
        take_step(*args, **kwargs)

    engine._take_model_step = inspect_and_take_step
    try:
        yield
    finally:
        engine._take_model_step = take_step


def reduced_gradient(weight: nn.Parameter) -> Tensor | None:
    """Return this rank's gradient of the global batch in fp32, unsharded over the data-parallel ranks.

    None for a frozen weight.
    """
    return cast(Tensor, safe_get_full_grad(weight)) if weight.requires_grad else None


@dataclass(frozen=True)
class NonFiniteGradient:
    """Origin of a gradient that is not finite; `str()` is meant for the log."""

    rank: int | None
    """First rank of the last stage that has one, because gradients flow from the last stage to the first; None if only
    the sum over the ranks overflowed."""
    stage: int = 0
    weight: str | None = None
    """Global name of the rank's first such weight; None if only a loss is not finite."""
    losses: tuple[int, ...] = ()
    """Heads whose loss is not finite on that rank."""

    def __str__(self) -> str:
        if self.rank is None:
            return "although it is on every rank: the sum over ranks overflowed"
        found = [f"the gradient of {self.weight}"] if self.weight else []
        if self.losses:
            found.append(f"the loss of head {', '.join(map(str, self.losses))}")
        return f"first on rank {self.rank} (stage {self.stage}): {' and '.join(found)}"


def module_group(name: str) -> str:
    """Return the module, such as `head_2`, to which a weight's global name belongs in logs."""
    if match := re.match(r"(?:heads|unembeddings|condition)\.(\d+)\.", name):
        return f"head_{match[1]}"
    if name.startswith("heads.repeated."):
        return "repeated_head"
    return "trunk" if name.startswith("trunk.") else "shared"


class GradientMonitor:
    """Per-module gradient norms, and the origin of NaN and inf.

    Reads the gradients before the data-parallel ranks sum them, and again before the update.
    """

    def __init__(
        self, pipeline: PipelineEngine, stage: MultiTokenPipeline, topology: Topology, modules: tuple[str, ...]
    ) -> None:
        """Hook into the pipeline. modules: results of `module_group` for the weights of the whole model."""
        self._stage = stage
        self._topology = topology
        self.modules = modules
        self._weights = {name: weight for name, weight in named_weights(stage) if weight.requires_grad}
        self._modules = {name: modules.index(module_group(name)) for name in self._weights}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._local_norms: dict[str, Tensor] = {}
        self.squared_norms = torch.zeros(len(modules), dtype=torch.float64, device=topology.device)
        """Squared norms per module of this rank's part of the last step's gradient, before clipping. Their sum over all
        ranks is that of the full gradient."""
        self.fault = torch.zeros((), dtype=torch.float64, device=topology.device)
        """0, or NaN if a gradient that this rank's optimizer reads in the last step is not finite."""
        self._in_norm: Tensor | None = None
        """A gradient of the last step that counts in DeepSpeed's norm."""
        hook_instruction(pipeline, schedule.ReduceTiedGrads, self._measure_local)
        hook_instruction(pipeline, schedule.OptimizerStep, self._measure_reduced)

    @torch.no_grad()
    def _measure_local(self, execute: RunInstruction) -> None:
        self._local_norms, _ = self._norms(_local_gradient)
        execute()

    @torch.no_grad()
    def _measure_reduced(self, execute: RunInstruction) -> None:
        norms, gradients = self._norms(_optimizer_gradient)
        self.squared_norms.zero_()
        if owned := [name for name in gradients if self._owns_gradient(self._weights[name])]:
            squares = torch.stack([norms[name] for name in owned]).double().square()
            self.squared_norms.index_add_(0, self._index(tuple(self._modules[name] for name in owned)), squares)
        if norms:
            self.fault = 0 * torch.stack(list(norms.values())).double().sum()
        tp_rank = self._topology.tp_rank
        in_norm = (gradients[name] for name in gradients if owns_param_for_norm(self._weights[name], tp_rank))
        self._in_norm = next(in_norm, None)
        execute()

    def _norms(self, read: Callable[[nn.Parameter], Tensor | None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return norms and gradients of the weights that have one."""
        found = ((name, read(weight)) for name, weight in self._weights.items())
        gradients = {name: gradient for name, gradient in found if gradient is not None}
        norms = torch._foreach_norm(list(gradients.values())) if gradients else ()
        return dict(zip(gradients, norms, strict=True)), gradients

    @torch.no_grad()
    def add_fault(self, fault: Tensor) -> None:
        """Add the fault of all ranks to one element of a gradient that counts in DeepSpeed's norm.

        If it is NaN, the optimizers of all ranks drop the step by their own rules, which consider only one replica of
        the model, without a synchronization of the device. Call it before the update.
        """
        if self._in_norm is not None:
            self._in_norm[(0,) * self._in_norm.dim()] += fault
        self._in_norm = None  # it would keep the gradient, with ZeRO its bucket, until the next update

    def _index(self, modules: tuple[int, ...]) -> Tensor:
        # Cached: a copy to the GPU waits for all of its queued work.
        if modules not in self._indices:
            self._indices[modules] = torch.tensor(modules, device=self._topology.device)
        return self._indices[modules]

    def _owns_gradient(self, weight: nn.Parameter) -> bool:
        """Return whether this rank counts what it has of a reduced gradient: each element counts on one rank only."""
        is_replicated = _is_full(weight) and self._topology.dp_rank > 0
        return owns_param_for_norm(weight, self._topology.tp_rank) and not is_replicated

    def find_non_finite(self) -> NonFiniteGradient:
        """Return where the last step's gradient was not finite. A collective over all ranks."""
        topology = self._topology
        weights = [name for name, norm in reversed(self._local_norms.items()) if not norm.isfinite()]
        # A head's gradient that is not finite also spreads to what all heads share.
        own = [name for name in weights if module_group(name) != "shared"]
        weight = next(iter(own or weights), None)
        losses: tuple[int, ...] = ()
        if topology.holds_loss:
            finite_losses = self._stage.heads.sums.cross_entropy[:-1].isfinite().tolist()
            losses = tuple(head for head, finite in enumerate(finite_losses, 1) if not finite)
        stage = self._stage.stage_of(weight) if weight and not losses else self._stage.phase_stages[-1]
        local = NonFiniteGradient(topology.rank, stage, weight, losses) if weight or losses else None
        found = [origin for origin in all_gather_objects(local) if origin]
        last_stage = max((origin.stage for origin in found), default=0)
        return next((origin for origin in found if origin.stage == last_stage), NonFiniteGradient(None))


def _local_gradient(weight: nn.Parameter) -> Tensor | None:
    """Return the gradient of this rank's micro-batches, in bf16 training their sum in fp32."""
    gradient: Tensor | None = getattr(weight, "_hp_grad", None)
    return weight.grad if gradient is None else gradient


def _is_full(weight: nn.Parameter) -> bool:
    """Return whether each data-parallel rank has the full reduced gradient of the weight, which ZeRO shards."""
    return not hasattr(weight, "_hp_mapping") or hasattr(weight, "_hp_grad")


def _optimizer_gradient(weight: nn.Parameter) -> Tensor | None:
    """Return the part of the weight's gradient that this rank's optimizer reads; None if there is none."""
    if _is_full(weight):
        return _local_gradient(weight)
    mapping: Any = weight._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    return cast(Tensor, mapping.get_lp_grad_fragment(weight._index_in_param_group))  # type: ignore[attr-defined]
