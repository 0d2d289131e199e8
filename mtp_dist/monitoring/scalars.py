"""Named scalars of a step and of a validation, the same for every log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mtp_dist.metrics import HeadMetrics, StepMetrics

Scalars = Mapping[str, float | None]
"""Values by name; None for a loss, accuracy or acceptance without a valid target."""


@dataclass(frozen=True)
class ThroughputUnits:
    """Constants that convert tokens to FLOPs and nats per token to bits per byte."""

    flops_per_token: Sequence[int]
    """Model FLOPs per trained position, forward and backward, with 1, 2, ... n active heads."""
    peak_flops: float | None
    """Peak FLOP/s of all devices of the run together; None if unknown."""
    bytes_per_token: Mapping[str | None, float]
    """Mean bytes of text per token, by validation set."""


@dataclass
class ThroughputWindow:
    """Totals over the steps since the last logged one."""

    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, metrics: StepMetrics, flops_per_token: int) -> None:
        self.tokens += metrics.tokens
        self.flops += metrics.tokens * flops_per_token
        self.seconds += metrics.seconds


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Convert a loss to a unit that does not depend on the tokenizer."""
    return nats_per_token / math.log(2) / bytes_per_token


def json_number(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def head_scalars(heads: HeadMetrics) -> dict[str, float | None]:
    """Return the losses in nats and the accuracies of a step or a validation."""
    scalars = {f"loss/head_{k}": loss for k, loss in enumerate(heads.losses, 1)}
    scalars["loss/total"] = heads.total
    scalars |= {f"loss/distillation/head_{k}": loss for k, loss in enumerate(heads.distillation, 2)}
    scalars |= {f"loss/total_variation/head_{k}": loss for k, loss in enumerate(heads.total_variation, 2)}
    if heads.token_order is not None:
        scalars["loss/token_order"] = heads.token_order
    return scalars | {f"accuracy/head_{k}": accuracy for k, accuracy in enumerate(heads.accuracies, 1)}


def acceptance_scalars(heads: HeadMetrics) -> dict[str, float | None]:
    """Return the acceptance of the heads' drafts in a validation (see HeadMetrics); nothing if there are no drafts."""
    if not heads.draft_acceptance_rates:
        return {}
    rates = enumerate(heads.draft_acceptance_rates, 2)
    scalars = {f"draft_acceptance_rate_pos_{distance}": rate for distance, rate in rates}
    return scalars | {"expected_tokens_per_forward": heads.expected_tokens_per_forward}


def _stage_scalars(metrics: StepMetrics) -> dict[str, float]:
    """Return the memory of each pipeline stage and the pipeline's bubble; nothing if there is one stage."""
    peak_memory: dict[int, int] = {}
    for rank in metrics.ranks:
        peak_memory[rank.stage] = max(rank.peak_memory, peak_memory.get(rank.stage, 0))
    if len(peak_memory) == 1:
        return {}
    busy = fmean(rank.busy_seconds for rank in metrics.ranks)
    longest = max(rank.schedule_seconds for rank in metrics.ranks)
    return {
        **{f"memory/peak_bytes/stage_{stage}": float(memory) for stage, memory in peak_memory.items()},
        "throughput/pipeline_bubble": 1 - busy / longest,
    }


def step_scalars(metrics: StepMetrics, window: ThroughputWindow, peak_flops: float | None) -> dict[str, float | None]:
    """Return a logged step's scalars besides those of the heads: rates per second over all ranks, memory in bytes."""
    flops_per_second = window.flops / window.seconds
    longest_wait = max(rank.waiting_seconds for rank in metrics.ranks)
    return {
        "train/grad_norm": metrics.grad_norm,
        **{f"train/grad_norm/{module}": norm for module, norm in metrics.grad_norms_by_module.items()},
        "train/learning_rate": metrics.learning_rate,
        **{f"train/learning_rate/{part}": rate for part, rate in metrics.learning_rates.items()},
        "throughput/tokens_per_second": window.tokens / window.seconds,
        "throughput/model_flops_per_second": flops_per_second,
        "throughput/mfu": flops_per_second / peak_flops if peak_flops else 0.0,
        "throughput/data_wait_share": longest_wait / window.seconds,
        "memory/peak_bytes": float(metrics.peak_memory),
        **_stage_scalars(metrics),
        **{f"data/epochs/{name}": epochs for name, epochs in metrics.epochs.items()},
    }


def validation_prefix(name: str | None) -> str:
    """Return the prefix of a validation set's scalars; the only set of a run may have no name."""
    return f"validation/{name}" if name else "validation"


def validation_scalars(heads: HeadMetrics, name: str | None, bytes_per_token: float) -> dict[str, float | None]:
    """Return the scalars of a validation: losses in nats per token and in bits per byte of text, accepted drafts."""
    prefix = validation_prefix(name)
    scalars = head_scalars(heads) | acceptance_scalars(heads)
    scalars = {f"{prefix}/{scalar}": value for scalar, value in scalars.items()}
    return scalars | {
        f"{prefix}/bits_per_byte/head_{k}": None if loss is None else bits_per_byte(loss, bytes_per_token)
        for k, loss in enumerate(heads.losses, 1)
    }
