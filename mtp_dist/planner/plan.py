"""The plan of a training: memory, time and cost of a layout, and what to change in it."""

from dataclasses import asdict
from typing import Any

from mtp_dist.planner.advice import balance_advice
from mtp_dist.planner.devices import BANDWIDTH_FRACTION, LAYER_FRACTION, MATMUL_FRACTION
from mtp_dist.planner.estimate import StepEstimate, time_by_part
from mtp_dist.planner.fit import COMPONENTS, longest_sequence, remedies
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.planner.layouts import layout


def plan(step: StepEstimate, tokens: float) -> dict[str, Any]:
    """Return what `mtp-dist plan --json` prints of a layout. tokens: number of tokens to train on."""
    config, cluster, accelerator = step.fit.config, step.cluster, step.cluster.accelerator
    fits = step.fit.binding.memory.total <= accelerator.memory_bytes
    return {
        "name": config.run.name,
        "parameters": parameter_counts(config).total,
        "heads": config.heads.count,
        "kind": config.heads.kind,
        "precision": config.train.precision,
        "sequence_length": config.train.sequence_length,
        "accelerator": accelerator.name,
        "label": accelerator.label,
        "source": accelerator.source,
        "gpus": config.world_size,
        "rates": asdict(cluster.rates),
        "assumed": {"matmul": MATMUL_FRACTION, "layer": LAYER_FRACTION, "bandwidth": BANDWIDTH_FRACTION},
        **layout_row(step, tokens),
        "memory": {
            "limit": accelerator.memory_bytes,
            "fits": fits,
            "binding": step.fit.binding.rank,
            "ranks": [
                {"rank": rank.rank, "trunk_layers": rank.trunk_layers, "in_flight": rank.in_flight}
                | {name: getattr(rank.memory, name) for name in COMPONENTS}
                | {"total": rank.memory.total}
                for rank in step.fit.ranks
            ],
            "remedies": [
                {"changes": changes, "total": total}
                for changes, total in (
                    [] if fits else remedies(config, cluster.usable_bytes, cluster.device, accelerator.per_node)
                )
            ],
        },
        "parts": time_by_part(step),
        "longest_sequence": longest_sequence(config, cluster.usable_bytes, cluster.device),
        "advice": balance_advice(step),
    }


def layout_row(step: StepEstimate, tokens: float) -> dict[str, Any]:
    """Return a layout with its memory, time and cost."""
    config = step.fit.config
    seconds = tokens / step.tokens_per_second
    return {
        "layout": layout(config),
        "data_parallel": config.dp_size,
        "micro_batches": config.micro_batches,
        "trunk_layers_per_stage": step.fit.split,
        "bytes": step.fit.binding.memory.total,
        "step_seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "balance": step.balance,
        "tokens": tokens,
        "days": seconds / 86400,
        "gpu_hours": config.world_size * seconds / 3600,
    }
