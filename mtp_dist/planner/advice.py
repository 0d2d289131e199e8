"""What to change in a layout whose pipeline ranks cannot share the work well."""

from collections.abc import Iterator

from mtp_dist.planner.balance import optimum
from mtp_dist.planner.estimate import StepEstimate, estimate
from mtp_dist.planner.fit import fit
from mtp_dist.planner.layouts import SCHEDULES, Changes, layout, overrides, stays_within_nodes, with_layout
from mtp_dist.planner.stage_cost import part_flops

WELL_BALANCED = 0.9
"""Mean work of the pipeline ranks, relative to that of the rank with the most, below which others are proposed."""


def balance_advice(step: StepEstimate) -> str | None:
    """Return what to do if the pipeline ranks cannot share the work well; None if they can."""
    config, ranks = step.fit.config, step.fit.config.parallel.pipeline
    if step.balance >= WELL_BALANCED:
        return None
    best = optimum(part_flops(config), config.model.trunk_layers, ranks)
    most = step.rank_work.index(max(step.rank_work))
    text = f"the {ranks} pipeline ranks can work at most {step.balance:.0%} of the time, rank {most} has the most work"
    if best < WELL_BALANCED:
        text += (
            f", and no split of {config.model.trunk_layers} layers and {config.heads.count} heads lets them work more "
            f"than {best:.0%}"
        )
    options = [f"{overrides(changes)} ({balance:.0%})" for changes, balance in _better_balanced(step)]
    return text + (f": use {' or '.join(options)}" if options else "")


def _better_balanced(step: StepEstimate) -> Iterator[tuple[Changes, float]]:
    """Yield well-balanced layouts that fit, with a smaller pipeline, without and with more tensor parallelism for it.

    Yield the other schedule or the balanced partition, and heads on more stages, if they balance better.
    """
    config, parallel = step.fit.config, step.fit.config.parallel
    current = layout(config)
    powers = [2**power for power in range(1, parallel.pipeline.bit_length())]
    smaller: list[Changes] = [{"parallel.pipeline": parallel.pipeline // n} for n in powers]
    more_tensor = [
        changes | {"parallel.tensor": parallel.tensor * n} for changes, n in zip(smaller, powers, strict=True)
    ]
    for several, least in (
        (smaller, WELL_BALANCED),
        (more_tensor, WELL_BALANCED),
        ([{"parallel.schedule": name} for name in SCHEDULES], step.balance + 0.05),
        ([{"heads.stages": count} for count in range(2, config.heads.count + 1)], step.balance + 0.05),
    ):
        for values in several:
            values = {"parallel.partition": "balanced"} | values
            changes = {key: value for key, value in values.items() if value != current[key]}
            changed = with_layout(config, changes)
            if changed is None or not stays_within_nodes(
                changed.parallel.tensor, changed.world_size, step.cluster.accelerator.per_node
            ):
                continue
            needed = fit(changed, step.cluster.device)
            balance = estimate(needed, step.cluster, simulated=False).balance
            if balance >= least and needed.binding.memory.total <= step.cluster.usable_bytes:
                yield changes, balance
                break
