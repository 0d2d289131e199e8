"""The global gradient norm, clipping, and a look at the whole gradient between its reduction and the update."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

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
