"""Memory of every rank of a pipeline, and what to change in a configuration that needs too much of it."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Literal, NamedTuple

from mtp_dist.config import Config
from mtp_dist.errors import ConfigError
from mtp_dist.planner.layouts import Changes, replace_values, stays_within_nodes, with_layout
from mtp_dist.planner.memory import RankMemory, rank_memory
from mtp_dist.planner.partition import fits_memory, pipeline_stages, trunk_layers_per_stage
from mtp_dist.planner.parts import Stage
from mtp_dist.planner.schedule import ScheduleName, instructions
from mtp_dist.planner.stage_cost import StageCost, stage_costs

DeviceType = Literal["cpu", "cuda"]

SEQUENCE_BLOCK = 128
"""Step in which the longest sequence is searched, in tokens."""
LONGEST_SEQUENCE = 2**24

COMPONENTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "accumulators": "fp32 sums of gradients",
    "optimizer": "optimizer state",
    "communication": "communication buffers",
    "activations": "activations",
    "workspace": "one layer's backward pass",
    "head_loss": "heads' loss",
    "update": "reduction and update",
}
"""Components of RankMemory in messages and tables."""


class PipelineRank(NamedTuple):
    """The memory of the ranks at one position of the pipeline."""

    rank: int
    """Position in the pipeline, from 0."""
    trunk_layers: tuple[int, ...]
    """Trunk layers of each of its stages."""
    in_flight: int
    """Largest number of micro-batches, with `dualpipev` on one of the two stages, whose activations are kept."""
    memory: RankMemory

    @property
    def largest_component(self) -> str:
        """Name of the component with the most bytes."""
        return max(COMPONENTS, key=lambda name: getattr(self.memory, name))


def pipeline_rank(config: Config, split: Sequence[Stage], rank: int, device: DeviceType) -> PipelineRank:
    """Return the memory of a pipeline rank. split: the parts of each stage."""
    parallel, stages = config.parallel, config.parallel.rank_stages(rank)
    few = min(config.micro_batches, 3 * parallel.pipeline)
    peaks = in_flight_peaks(parallel.schedule, rank, parallel.pipeline, few)
    in_flight = max(map(sum, peaks))
    layers = tuple(split[stage].layers for stage in stages)
    if len(stages) == 1:
        memory = rank_memory(config, rank, layers[0], in_flight, device, split[rank].heads)
        return PipelineRank(rank, layers, in_flight, memory)
    first, second = (rank_memory(config, stage, split[stage].layers, 1, device, split[stage].heads) for stage in stages)
    activations = max(count * first.activations + more * second.activations for count, more in peaks)
    return PipelineRank(rank, layers, in_flight, _on_one_rank(first, second, activations))


def _on_one_rank(first: RankMemory, second: RankMemory, activations: int) -> RankMemory:
    """Return the memory of a rank with two stages, each given with one micro-batch. Their passes do not overlap."""

    def fixed(memory: RankMemory) -> int:
        return memory.state + memory.communication

    names = [each.name for each in fields(RankMemory)]
    values = {name: getattr(first, name) + getattr(second, name) for name in names}
    extra = max(memory.total - fixed(memory) - memory.activations for memory in (first, second))
    values["activations"], values["workspace"] = activations, max(first.workspace, second.workspace)
    values["total"] = fixed(first) + fixed(second) + max(activations + extra, first.update + second.update)
    return RankMemory(**{name: values[name] for name in names})


@cache
def in_flight_peaks(schedule: ScheduleName, rank: int, ranks: int, micro_batches: int) -> list[tuple[int, int]]:
    """Return how many micro-batches a rank keeps the activations of in each of its stages, at all moments at which one
    more would not have fewer in either.

    With more than 3 * ranks micro-batches the schedules only repeat what they do.
    """
    held, peaks = [0, 0], set()
    for instruction in instructions(schedule, rank, ranks, micro_batches):
        if instruction.kind in ("forward", "backward"):
            held[instruction.phase] += 1 if instruction.kind == "forward" else -1
            peaks.add((held[0], held[1]))
    return [a for a in peaks if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in peaks)]


@dataclass(frozen=True)
class Fit:
    """A layout, how it splits trunk and heads, and what it needs."""

    config: Config
    stages: tuple[Stage, ...]
    device: DeviceType
    kinds: dict[tuple[object, ...], PipelineRank]
    """The first of the ranks with the same weights, of which later ones keep fewer activations."""

    @property
    def split(self) -> tuple[int, ...]:
        """Trunk layers of each stage."""
        return tuple(stage.layers for stage in self.stages)

    @property
    def binding(self) -> PipelineRank:
        """The rank that needs the most memory."""
        return max(self.kinds.values(), key=lambda rank: rank.memory.total)

    @property
    def halves(self) -> bool:
        """True if each rank has two stages."""
        return self.config.parallel.stages > self.config.parallel.pipeline

    @cached_property
    def costs(self) -> list[StageCost]:
        """The work of each stage per micro-batch, and its bytes to the data-parallel ranks per step."""
        return stage_costs(self.config, self.stages)

    def alike(self, rank: int) -> PipelineRank:
        """Return a rank with the same weights."""
        return self.kinds[_kind(self.config, self.stages, rank)]

    @property
    def ranks(self) -> list[PipelineRank]:
        """All ranks of the pipeline."""
        return [
            pipeline_rank(self.config, self.stages, rank, self.device) for rank in range(self.config.parallel.pipeline)
        ]


def _kind(config: Config, split: Sequence[Stage], rank: int) -> tuple[object, ...]:
    """Return what the weights of a pipeline rank depend on: whether it is an end of the pipeline, whether it has
    head 1, and its parts."""
    ends = (rank == 0) + 2 * (rank == config.parallel.pipeline - 1)
    has_head_1 = rank == config.parallel.stages - config.heads.stages
    return ends, has_head_1, *(split[stage] for stage in config.parallel.rank_stages(rank))


def fit(config: Config, device: DeviceType = "cuda") -> Fit:
    """Return the memory that training needs with the split that it uses."""
    split = pipeline_stages(config)
    kinds: dict[tuple[object, ...], PipelineRank] = {}
    for rank in range(config.parallel.pipeline):
        if (kind := _kind(config, split, rank)) not in kinds:
            kinds[kind] = pipeline_rank(config, split, rank, device)
    return Fit(config, split, device, kinds)


def longest_sequence(config: Config, memory_bytes: float, device: DeviceType = "cuda") -> int:
    """Return the largest multiple of 128 tokens that fits as `train.sequence_length`; 0 if none does."""

    def fits(blocks: int) -> bool:
        changed = replace_values(config, {"train.sequence_length": SEQUENCE_BLOCK * blocks})
        return fit(changed, device).binding.memory.total <= memory_bytes

    blocks = range(1, LONGEST_SEQUENCE // SEQUENCE_BLOCK + 1)
    return SEQUENCE_BLOCK * bisect_left(blocks, True, key=lambda block: not fits(block))


def remedies(
    config: Config, memory_bytes: float, device: DeviceType = "cuda", per_node: int = 8
) -> list[tuple[Changes, int]]:
    """Return changes of keys with which every rank fits, and the bytes that the largest one then needs.

    Single changes, each the smallest of its kind that suffices, or if none does changes together. The world size stays.
    per_node: number of ranks per node, in which groups of tensor-parallel ranks stay.
    """

    def first_fit(several: Iterable[Changes]) -> Iterator[tuple[Changes, int]]:
        for changes in several:
            changed = with_layout(config, changes)
            if changed and (needed := fit(changed, device).binding.memory.total) <= memory_bytes:
                yield changes, needed
                return

    savers, degrees = _savers(config), list(_degrees(config, per_node))
    splits = list(_splits_that_fit(config, memory_bytes, device))
    if single := [found for several in [splits, *savers, *degrees] for found in first_fit(several)]:
        return single
    together: Changes = {}
    for several in savers:
        together |= several[-1]
    return list(first_fit([together, *(together | changes for several in degrees for changes in several)]))


def _splits_that_fit(config: Config, memory_bytes: float, device: DeviceType) -> Iterator[Changes]:
    """Yield the fastest split of those that fit, unless the configuration has a split of its own."""
    parallel = config.parallel
    if parallel.schedule == "1f1b" and parallel.pipeline > 1 and isinstance(parallel.partition, str):
        balanced = replace_values(config, {"parallel.partition": "balanced"})
        with suppress(ConfigError):  # no split fits
            fits = fits_memory(config, memory_bytes, device)
            yield {"parallel.partition": trunk_layers_per_stage(balanced, fits=fits)}


def _savers(config: Config) -> list[list[Changes]]:
    """Return changes that save memory at the same degrees of parallelism, by their kind and mildest first."""
    train, parallel, heads = config.train, config.parallel, config.heads
    checkpointing = ("none", "selective", "full")
    stronger = checkpointing[checkpointing.index(train.activation_checkpointing) + 1 :]
    savers: list[list[Changes]] = [
        [{"train.micro_batch_size": size} for size in range(train.micro_batch_size - 1, 0, -1)],
        [{"train.activation_checkpointing": value} for value in stronger],
        [{"heads.loss_mode": "eager"}] * (heads.loss_mode == "naive"),
        [{"parallel.zero_stage": 1}] * (parallel.zero_stage == 0 and train.precision == "fp32"),
        [{"parallel.sequence": True}] * (parallel.tensor > 1 and not parallel.sequence),
    ]
    return [several for several in savers if several]


def _degrees(config: Config, per_node: int) -> Iterator[list[Changes]]:
    """Yield changes to higher degrees of tensor and of pipeline parallelism, at the cost of data parallelism."""
    parallel, powers = config.parallel, [2**power for power in range(1, 11)]
    tensor = [n for n in powers if n > parallel.tensor and stays_within_nodes(n, config.world_size, per_node)]
    yield [{"parallel.tensor": n, "parallel.sequence": True} for n in tensor]
    balanced: Changes = {} if isinstance(parallel.partition, str) else {"parallel.partition": "balanced"}
    yield [{"parallel.pipeline": n} | balanced for n in powers if n > parallel.pipeline]
