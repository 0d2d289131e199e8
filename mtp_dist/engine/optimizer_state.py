"""Adam's moments and its count of updates, whatever wraps the optimizer."""

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
    """Make the moments reachable by their weights, also before the first update, at which the optimizer makes them."""
    optimizer = engine.basic_optimizer
    if not optimizer.state:
        _update_nothing(optimizer)
        set_updates(engine, 0)
    if engine.optimizer is not optimizer:
        # By itself DeepSpeed 0.19.8 links them after the first group's first update: under ZeRO 1 the weights of the
        # other groups then have none.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _update_nothing(optimizer: torch.optim.Optimizer) -> None:
    # The optimizer's own weights: fp32 copies of this rank's partition under ZeRO and in bf16.
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients, rates = [weight.grad for weight in weights], [group["lr"] for group in optimizer.param_groups]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _counters(engine: PipelineEngine) -> list[dict[str, object]]:
    """Return where Adam counts its updates: PyTorch for each weight, Apex for each group."""
    optimizer = engine.basic_optimizer
    return [holder for holder in (*optimizer.state.values(), *optimizer.param_groups) if "step" in holder]


def check_updates(engine: PipelineEngine, made: int) -> None:
    """Raise RuntimeError unless every counter of the optimizer says that so many updates were made."""
    counts = {int(holder["step"]) for holder in _counters(engine)}  # type: ignore[call-overload]
    if counts != {made}:
        raise RuntimeError(f"the optimizer's counters say {sorted(counts)}, {made} updates were made")


def set_updates(engine: PipelineEngine, count: int) -> None:
    for holder in _counters(engine):
        if isinstance(holder["step"], Tensor):
            holder["step"].fill_(count)
        else:
            holder["step"] = count


def moment(engine: PipelineEngine, name: str, weight: nn.Parameter) -> Tensor:
    """One of MOMENTS of this rank's weight, fp32. A collective over the data-parallel group."""
    whole: Tensor | None = safe_get_full_optimizer_state(weight, name)
    if whole is not None:
        return whole
    state: Tensor = engine.basic_optimizer.state[weight][name]
    return state


def set_moment(engine: PipelineEngine, name: str, weight: nn.Parameter, value: Tensor) -> None:
    """Replace it; value has the weight's shape."""
    if hasattr(weight, "_hp_mapping"):
        safe_set_full_optimizer_state(weight, value, name)
    else:
        engine.basic_optimizer.state[weight][name].copy_(value)


def owned_rows(weight: nn.Parameter) -> tuple[int, int] | None:
    """Return the first row of a weight that has moments on this rank under ZeRO or in bf16, and the one after the last.

    None if this rank keeps the moments of all rows.
    """
    if not hasattr(weight, "_hp_mapping"):
        return None
    if weight._hp_mapping is None:
        return 0, 0
    kept, width = weight._hp_mapping.lp_fragment_address, weight.numel() // len(weight)
    return kept.start // width, -(-(kept.start + kept.numel) // width)


def set_master_weight(weight: nn.Parameter, value: Tensor) -> None:
    """Replace a weight, and the optimizer's fp32 copy where it keeps one; value is fp32 of the weight's shape."""
    safe_set_full_fp32_param(weight, value)
    weight.data.copy_(value)
