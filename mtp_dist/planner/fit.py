"""Memory of every rank of a pipeline, and what to change in a configuration that needs too much of it."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from mtp_dist.config import Config, DeviceType
from mtp_dist.planner.layouts import Changes, replace_values, stays_within_nodes, with_layout
from mtp_dist.planner.memory import RankMemory, in_flight, pipeline_rank_memory
from mtp_dist.planner.partition import distinct_ranks, pipeline_stages, rank_stages, weights_key
from mtp_dist.planner.parts import Stage
from mtp_dist.planner.stage_cost import StageCost, stage_costs

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
    stages = rank_stages(config, split, rank)
    layers, most = tuple(stage.layers for stage in stages), max(map(sum, in_flight(config, rank)))
    return PipelineRank(rank, layers, most, pipeline_rank_memory(config, rank, stages, device))


@dataclass(frozen=True)
class Fit:
    """A layout, how it splits trunk and heads, and what it needs."""

    config: Config
    stages: tuple[Stage, ...]
    device: DeviceType
    distinct_ranks: dict[tuple[object, ...], PipelineRank]
    """The first of the pipeline ranks with the same weights, of which later ones keep fewer activations, by
    `weights_key`."""

    @property
    def split(self) -> tuple[int, ...]:
        """Trunk layers of each stage."""
        return tuple(stage.layers for stage in self.stages)

    @property
    def binding(self) -> PipelineRank:
        """The rank that needs the most memory."""
        return max(self.distinct_ranks.values(), key=lambda rank: rank.memory.total)

    @property
    def mean_bytes(self) -> float:
        """Mean memory of the ranks of the pipeline."""
        return sum(rank.memory.total for rank in self.ranks) / self.config.parallel.pipeline

    @property
    def halves(self) -> bool:
        """True if each rank has two stages."""
        return self.config.parallel.stages > self.config.parallel.pipeline

    @cached_property
    def costs(self) -> list[StageCost]:
        """The work of each stage per micro-batch, and its bytes to the data-parallel ranks per step."""
        return stage_costs(self.config, self.stages)

    def rank_with_weights_of(self, rank: int) -> PipelineRank:
        """Return the first rank that has the same weights as this one."""
        return self.distinct_ranks[weights_key(self.config, rank, rank_stages(self.config, self.stages, rank))]

    @property
    def ranks(self) -> list[PipelineRank]:
        """All ranks of the pipeline."""
        return [
            pipeline_rank(self.config, self.stages, rank, self.device) for rank in range(self.config.parallel.pipeline)
        ]


def fit(config: Config, device: DeviceType = "cuda") -> Fit:
    """Return the memory that training needs with the split that it uses."""
    split = pipeline_stages(config)
    ranks = distinct_ranks(config, split)
    return Fit(config, split, device, {key: pipeline_rank(config, split, rank, device) for key, rank in ranks.items()})


def longest_sequence(config: Config, memory_bytes: float, device: DeviceType = "cuda") -> int:
    """Return the largest multiple of 128 tokens that fits as `train.sequence_length`; 0 if none does."""

    def fits(blocks: int) -> bool:
        changed = replace_values(config, {"train.sequence_length": SEQUENCE_BLOCK * blocks})
        return fit(changed, device).binding.memory.total <= memory_bytes

    blocks = range(1, LONGEST_SEQUENCE // SEQUENCE_BLOCK + 1)
    return SEQUENCE_BLOCK * bisect_left(blocks, True, key=lambda block: not fits(block))


def remedies(
    config: Config, memory_bytes: float, device: DeviceType = "cuda", per_node: int = 8, shared: bool = False
) -> list[tuple[Changes, int]]:
    """Return changes of keys with which every rank fits, and the bytes that the largest one then needs.

    Single changes, each the smallest of its kind that suffices, or if none does changes together. The world size stays.
    per_node: number of ranks per node, in which groups of tensor-parallel ranks stay. shared: the ranks share the
    memory of one machine, so that `memory_bytes` bounds their mean, which is then returned instead.
    """

    def first_fit(several: Iterable[Changes]) -> Iterator[tuple[Changes, int]]:
        for changes in several:
            if changed := with_layout(config, changes):
                found = fit(changed, device)
                needed = int(found.mean_bytes) if shared else found.binding.memory.total
                if needed <= memory_bytes:
                    yield changes, needed
                    return

    savers, degrees = _savers(config), list(_degrees(config, per_node))
    if single := [found for several in [*savers, *degrees] for found in first_fit(several)]:
        return single
    together: Changes = {}
    for several in savers:
        together |= several[-1]
    return list(first_fit([together, *(together | changes for several in degrees for changes in several)]))


def _savers(config: Config) -> list[list[Changes]]:
    """Return changes that save memory at the same degrees of parallelism, by their kind and mildest first."""
    train, parallel, heads = config.train, config.parallel, config.heads
    checkpointing = ("none", "selective", "full")
    stronger = checkpointing[checkpointing.index(train.activation_checkpointing) + 1 :]
    savers: list[list[Changes]] = [
        [{"parallel.partition": "balanced"}] * (parallel.partition == "uniform" and parallel.pipeline > 1),
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
