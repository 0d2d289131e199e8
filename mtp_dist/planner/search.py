"""The fastest layouts of a training that fit the memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from mtp_dist.config import Config, with_device_memory
from mtp_dist.errors import ConfigError
from mtp_dist.planner.estimate import StepEstimate, estimate
from mtp_dist.planner.fit import COMPONENTS, Fit, fit
from mtp_dist.planner.layouts import LAYOUT_KEYS, SCHEDULES, layout, overrides, stays_within_nodes, with_layout
from mtp_dist.planner.memory import USABLE_FRACTION
from mtp_dist.planner.stage_times import Cluster

SIMULATED = 12
"""Number of layouts, the fastest ones by a formula for their time, whose pipelines are simulated."""
LARGEST_EXCESS = 1.02
"""Memory that the fastest split may need, relative to what is usable, for slower ones to be tried that need less."""
WELL_BALANCED = 0.97
"""Mean work of the pipeline ranks, relative to that of the rank with the most, from which on heads stay together."""
MOST_HEAD_STAGES = 4
"""Largest number of stages with heads that is tried."""
LARGEST_MICRO_BATCH = 64
"""Samples of the largest micro-batch that is tried."""


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search."""

    fastest: list[StepEstimate]
    """The fastest layouts that fit, each the best one of its degrees and schedule."""
    fitting: int
    """Number of layouts that fit the memory."""


def search(config: Config, cluster: Cluster, world_size: int, count: int = 5) -> SearchResult:
    """Return the fastest layouts on `world_size` ranks. The global batch stays as it is.

    config: has the vocabulary size; its own layout need not be valid. Raise ConfigError if no layout divides model,
    batch and ranks, or if none fits the memory.
    """
    fitting, smallest, memory = 0, None, cluster.usable_bytes
    best: dict[Degrees, StepEstimate] = {}
    for degrees, layouts in _layouts(config, cluster, world_size):
        for candidate in layouts:
            needed = _fit(candidate, cluster)
            if smallest is None or needed.binding.memory.total < smallest.binding.memory.total:
                smallest = needed
            if needed.binding.memory.total > memory:
                break  # larger micro-batches need more
            fitting += 1
            step = estimate(needed, cluster, simulated=False)
            if degrees not in best or _order(step) < _order(best[degrees]):
                best[degrees] = step
    best_heads = (min([step, *_with_split_heads(step)], key=_order) for step in best.values())
    promising = sorted(best_heads, key=_order)[:SIMULATED]
    simulated = sorted((estimate(step.fit, cluster) for step in promising), key=_order)
    if smallest is None:
        raise ConfigError(_no_layout(config, world_size))
    if not fitting:
        raise ConfigError(_too_large(smallest, cluster))
    return SearchResult(simulated[:count], fitting)


def _fit(candidate: Config, cluster: Cluster) -> Fit:
    """Return what a layout needs, with the split that a run uses if it is likely to fit."""
    found, bounded = fit(candidate, cluster.device), with_device_memory(candidate, cluster.memory)
    if cluster.usable_bytes < found.binding.memory.total <= LARGEST_EXCESS * cluster.usable_bytes:
        return fit(bounded, cluster.device)
    return replace(found, config=bounded)


def _with_split_heads(step: StepEstimate) -> Iterator[StepEstimate]:
    """Yield a layout with heads on several stages, for each number of them that fits, unless it is well balanced."""
    config, cluster = step.fit.config, step.cluster
    if step.balance > WELL_BALANCED:
        return
    for stages in range(2, min(config.heads.count, MOST_HEAD_STAGES) + 1):
        if candidate := with_layout(config, {"heads.stages": stages}):
            found = fit(candidate, cluster.device)
            if found.binding.memory.total <= cluster.usable_bytes:
                yield estimate(found, cluster, simulated=False)


Degrees = tuple[int, int, str]
"""Tensor- and pipeline-parallel degree, and the schedule."""


def _order(step: StepEstimate) -> tuple[float, int]:
    """Return the time of a step and, of equally fast ones, the memory."""
    return step.seconds, step.fit.binding.memory.total


def _layouts(config: Config, cluster: Cluster, world_size: int) -> Iterator[tuple[Degrees, Iterator[Config]]]:
    """Yield the valid layouts that differ in their micro-batches only, smallest first, with their degrees.

    Tensor parallelism stays within a node, where its links are.
    """
    unsharded, per_node = config.train.precision == "fp32", cluster.accelerator.per_node
    for tensor, pipeline in product(_divisors(world_size, per_node), _divisors(world_size)):
        if world_size % (tensor * pipeline) or not stays_within_nodes(tensor, world_size, per_node):
            continue
        dp_size = world_size // (tensor * pipeline)
        micro_batches = _divisors(config.train.global_batch_size // dp_size, LARGEST_MICRO_BATCH)
        for schedule, sequence, zero_stage, checkpointing in product(
            SCHEDULES if pipeline > 1 else ["1f1b"],
            [False, True] if tensor > 1 else [False],
            [0, 1] if unsharded and dp_size > 1 else [config.parallel.zero_stage],
            ["none", "selective", "full"],
        ):
            keys = tensor, pipeline, schedule, "balanced", sequence, zero_stage, checkpointing
            values = dict(zip(LAYOUT_KEYS, keys, strict=False)) | {"heads.stages": 1}
            found = (with_layout(config, values | {"train.micro_batch_size": n}, world_size) for n in micro_batches)
            yield (tensor, pipeline, schedule), filter(None, found)


def _divisors(number: int, largest: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, largest or number) + 1) if number % n == 0]


def _no_layout(config: Config, world_size: int) -> str:
    model = config.model
    return (
        f"no layout divides --gpus = {world_size}: parallel.tensor must divide model.num_attention_heads = "
        f"{model.num_attention_heads}, model.num_query_groups = {model.query_groups} and model.ffn_hidden_size = "
        f"{model.ffn_size}, parallel.pipeline is limited by model.trunk_layers = {model.trunk_layers}, and the rest, "
        f"the data-parallel degree, must divide train.global_batch_size = {config.train.global_batch_size}: change the "
        "number of GPUs or the global batch"
    )


def _too_large(smallest: Fit, cluster: Cluster) -> str:
    binding, accelerator = smallest.binding, cluster.accelerator
    largest = binding.largest_component
    return (
        f"no layout of --gpus = {smallest.config.world_size} fits {USABLE_FRACTION:.0%} of "
        f"{accelerator.memory_bytes / 1e9:.0f} GB ({accelerator.label}): the smallest, "
        f"{overrides(layout(smallest.config))}, needs {binding.memory.total / 1e9:.1f} GB, of which "
        f"{getattr(binding.memory, largest) / 1e9:.1f} GB are {COMPONENTS[largest]}: use more GPUs, GPUs with more "
        "memory or shorter sequences"
    )
