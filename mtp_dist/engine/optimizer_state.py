"""Adam's moments and update counters, with and without ZeRO and in bf16."""

from typing import cast

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def ensure_state(engine: PipelineEngine) -> None:
    """Make the moments accessible by their weights, also before the first update, which creates them."""
    optimizer = engine.basic_optimizer
    if not optimizer.state:
        _update_nothing(optimizer)
        set_updates(engine, 0)
    if engine.optimizer is not optimizer:
        # DeepSpeed 0.19.8 itself links them after the first group's first update: under ZeRO 1 the weights of the
        # other groups then have none.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _update_nothing(optimizer: torch.optim.Optimizer) -> None:
    # The optimizer's own weights: fp32 copies of this rank's partition under ZeRO and in bf16.
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients, learning_rates = [weight.grad for weight in weights], [group["lr"] for group in optimizer.param_groups]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate


def _counters(engine: PipelineEngine) -> list[dict[str, object]]:
    """Return the dictionaries with Adam's counters: one per weight in PyTorch, one per group in Apex."""
    optimizer = engine.basic_optimizer
    return [holder for holder in (*optimizer.state.values(), *optimizer.param_groups) if "step" in holder]


def check_updates(engine: PipelineEngine, updates: int) -> None:
    """Raise RuntimeError unless every counter of the optimizer equals the number of updates."""
    counts = {int(holder["step"]) for holder in _counters(engine)}  # type: ignore[call-overload]
    if counts != {updates}:
        raise RuntimeError(f"the optimizer's counters are {sorted(counts)} after {updates} updates")


def set_updates(engine: PipelineEngine, count: int) -> None:
    for holder in _counters(engine):
        if isinstance(holder["step"], Tensor):
            holder["step"].fill_(count)
        else:
            holder["step"] = count


def moment(engine: PipelineEngine, name: str, weight: nn.Parameter) -> Tensor | None:
    """Return one of MOMENTS of this rank's weight, fp32; None for a frozen one.

    A collective over the data-parallel group.
    """
    if not weight.requires_grad:
        return None
    full: Tensor | None = safe_get_full_optimizer_state(weight, name)
    if full is not None:
        return full
    return cast(Tensor, engine.basic_optimizer.state[weight][name])


def set_moment(engine: PipelineEngine, name: str, weight: nn.Parameter, value: Tensor) -> None:
    """Replace one of MOMENTS; value has the weight's shape."""
    if hasattr(weight, "_hp_mapping"):
        safe_set_full_optimizer_state(weight, value, name)
    else:
        engine.basic_optimizer.state[weight][name].copy_(value)


def owned_rows(weight: nn.Parameter) -> tuple[int, int] | None:
    """Return the first row of a weight with moments on this rank, and the row after the last.

    None if this rank has the moments of all rows, which is so without ZeRO in fp32.
    """
    if not hasattr(weight, "_hp_mapping"):
        return None
    if weight._hp_mapping is None:
        return 0, 0
    kept, width = weight._hp_mapping.lp_fragment_address, weight.numel() // len(weight)
    return kept.start // width, -(-(kept.start + kept.numel) // width)


def set_master_weight(weight: nn.Parameter, value: Tensor) -> None:
    """Replace a weight, and the optimizer's fp32 copy if there is one; value is fp32 and has the weight's shape."""
    safe_set_full_fp32_param(weight, value)
    weight.data.copy_(value)
