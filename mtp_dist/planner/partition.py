"""Trunk layers and heads of each pipeline stage. The first stage also has the embedding, the last ones the heads."""

import heapq
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from mtp_dist.config import Config, DeviceType
from mtp_dist.planner.memory import USABLE_FRACTION, RankNeeds, in_flight, rank_needs
from mtp_dist.planner.parts import Parts, Stage
from mtp_dist.planner.stage_cost import part_flops

LayersCost = Callable[[int, int], float]
"""Cost of a stage, counted from 0, by its number of trunk layers; more layers never cost less."""
LayersFit = Callable[[int, int], bool]
"""Whether a stage, counted from 0, fits the memory with a number of trunk layers; if it does, fewer layers fit too."""
RankFits = Callable[[int, Sequence[Stage]], bool]
"""Whether a pipeline rank fits the memory with these stages: one, or its two of `dualpipev`."""


def split_layers(layers: int, fewest: Sequence[int], cost: LayersCost, fits: LayersFit) -> tuple[int, ...] | None:
    """Return the layers of each stage that make the slowest stage as fast as possible; None if no split fits.

    fewest: smallest number of layers of each stage. Each further layer goes to the stage that is the fastest with it.
    That is optimal because more layers cost more: as long as layers are left, some stage can take one within the
    optimum's bound, and so can the fastest. Of stages that are equally fast the last one gets the layer: the first ones
    keep the most micro-batches in flight.
    """
    most = [_most_layers(layers, partial(fits, stage)) for stage in range(len(fewest))]
    split = list(fewest)
    if sum(split) > layers or sum(most) < layers or any(map(operator.gt, split, most)):
        return None
    queue = [(cost(stage, count + 1), -stage) for stage, count in enumerate(split) if count < most[stage]]
    heapq.heapify(queue)
    for _ in range(layers - sum(split)):
        stage = -queue[0][1]
        split[stage] += 1
        if split[stage] < most[stage]:
            heapq.heapreplace(queue, (cost(stage, split[stage] + 1), -stage))
        else:
            heapq.heappop(queue)
    return tuple(split)


def _most_layers(layers: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number of up to `layers` layers that fits; -1 if not even 0 does."""
    if fits(layers):
        return layers
    return bisect_left(range(layers), True, key=lambda count: not fits(count)) - 1


def fewest_layers(stages: int, trained_embedding: bool = True) -> list[int]:
    """Return the smallest number of trunk layers of each stage: one if it has no other weight that is trained."""
    others = {stages - 1} | ({0} if trained_embedding else set())
    return [int(stage not in others) for stage in range(stages)]


def split_heads(heads: int, stages: int, holders: int) -> Iterator[list[int]]:
    """Yield the heads of each stage if the last `holders` ones have some: any number on the first of them, on which the
    trunk ends, equal ones on those behind it."""
    behind = holders - 1
    for first in range(1, heads - behind + 1) if behind else [heads]:
        share, odd = divmod(heads - first, max(1, behind))
        yield [*[0] * (stages - holders), first, *(share + (index < odd) for index in range(behind))]


def head_numbers(stages: Sequence[Stage]) -> list[range]:
    """Return the numbers of each stage's heads, in their order."""
    ends = accumulate(stage.heads for stage in stages)
    return [range(end - stage.heads + 1, end + 1) for end, stage in zip(ends, stages, strict=True)]


def split_dual_pipe_v(parts: Parts, layers: int, heads: Sequence[int], fits: RankFits) -> tuple[int, ...] | None:
    """Return the trunk layers of each of 2p stages, of which rank r of p has r and 2p - 1 - r; None if none fits.

    heads: number of heads on each rank, all on its second stage, those with heads first. A rank's layers are split so
    that both of its stages take equally long.
    """
    holders = sum(count > 0 for count in heads)

    def halves(rank: int, count: int) -> tuple[Stage, Stage]:
        # The trunk ends on the first stage with heads: ranks before that one have no layer behind it.
        worth = parts.stage(Stage(0, heads[rank])).total / parts.stage(Stage(1)).total
        most = 0 if rank < holders - 1 else count - (rank > 0)
        second = min(most, max(int(rank >= holders), int((count - worth + 1) // 2)))
        return Stage(count - second), Stage(second, heads[rank])

    def cost(rank: int, count: int) -> float:
        first, second = halves(rank, count)
        return parts.stage(first, rank == 0).total + parts.stage(second, has_head_1=rank == holders - 1).total

    fewest = [(rank > 0) + (rank >= holders) for rank in range(len(heads))]
    split = split_layers(layers, fewest, cost, lambda rank, count: fits(rank, halves(rank, count)))
    if split is None:
        return None
    firsts, seconds = zip(*(halves(rank, count) for rank, count in enumerate(split)), strict=True)
    return tuple(stage.layers for stage in (*firsts, *reversed(seconds)))


def weights_key(config: Config, rank: int, stages: Sequence[Stage]) -> tuple[object, ...]:
    """Return what the weights of a pipeline rank depend on: whether it is an end of the pipeline, whether it has
    head 1, and its stages."""
    ends = (rank == 0) + 2 * (rank == config.parallel.pipeline - 1)
    has_head_1 = rank == config.parallel.stages - config.heads.stages
    return ends, has_head_1, *stages


def rank_stages(config: Config, stages: Sequence[Stage], rank: int) -> list[Stage]:
    """Return the stages of a pipeline rank."""
    return [stages[index] for index in config.parallel.rank_stages(rank)]


def distinct_ranks(config: Config, stages: Sequence[Stage]) -> dict[tuple[object, ...], int]:
    """Return the first pipeline rank of those with the same weights, of which later ones keep fewer activations.

    They are given by their `weights_key`.
    """
    ranks: dict[tuple[object, ...], int] = {}
    for rank in range(config.parallel.pipeline):
        ranks.setdefault(weights_key(config, rank, rank_stages(config, stages, rank)), rank)
    return ranks


def rank_bytes(config: Config, device: DeviceType) -> Callable[[int, Sequence[Stage]], int]:
    """Return a function that returns the memory of a pipeline rank with these stages."""
    found: dict[tuple[object, ...], RankNeeds] = {}

    def total(rank: int, stages: Sequence[Stage]) -> int:
        key = weights_key(config, rank, stages)
        if key not in found:
            found[key] = rank_needs(config, config.parallel.rank_stages(rank), stages, device)
        return found[key].memory(in_flight(config, rank)).total

    return total


def trunk_layers_per_stage(config: Config, parts: Parts | None = None) -> tuple[int, ...]:
    """Return the number of trunk layers of each stage, see `pipeline_stages`."""
    return tuple(stage.layers for stage in pipeline_stages(config, parts))


def pipeline_stages(config: Config, parts: Parts | None = None) -> tuple[Stage, ...]:
    """Return the trunk layers and heads of each stage, first stage first. `dualpipev` has two stages per rank.

    parts: costs that `balanced` and `measured` split by; by default FLOPs, with which `measured` is `balanced` until
    the run has measured. Heads are split by them at every partition.

    The slowest stage is as fast as possible. If its ranks' memory is known and one would need more than
    USABLE_FRACTION of it, it is as fast as possible of the splits that need less, or of those that fit at all. If none
    does, memory is no bound.
    """
    costs, memory = parts or part_flops(config), config.device_memory
    fastest = _fastest_stages(config, costs, lambda rank, stages: True)
    assert fastest, "the configuration has been checked"
    if memory is None:
        return fastest
    needed = rank_bytes(config, memory.device)
    for limit in (USABLE_FRACTION * memory.bytes, memory.bytes):

        def fits(rank: int, stages: Sequence[Stage], limit: float = limit) -> bool:
            return needed(rank, stages) <= limit

        if _all_fit(config, fastest, fits):
            return fastest
        if found := _fastest_stages(config, costs, fits):
            return found
    return fastest


def _all_fit(config: Config, stages: Sequence[Stage], fits: RankFits) -> bool:
    """Return whether every pipeline rank fits with these stages."""
    return all(fits(rank, rank_stages(config, stages, rank)) for rank in distinct_ranks(config, stages).values())


def _fastest_stages(config: Config, costs: Parts, fits: RankFits) -> tuple[Stage, ...] | None:
    """Return the stages of which the slowest is as fast as possible; None if no split fits."""
    found = []
    for heads in split_heads(costs.num_heads, config.parallel.stages, config.heads.stages):
        if split := _split_trunk(config, costs, heads, fits):
            stages = tuple(map(Stage, split, heads))
            if _all_fit(config, stages, fits):  # a given partition need not
                found.append(stages)
    return min(found, key=lambda stages: max(passes.total for passes in costs.stages(stages)), default=None)


def _split_trunk(config: Config, costs: Parts, heads: Sequence[int], fits: RankFits) -> tuple[int, ...] | None:
    """Return the trunk layers of each stage, given its heads; None if no split fits."""
    parallel, layers = config.parallel, config.model.trunk_layers
    trunk_stages = parallel.stages - config.heads.stages + 1
    behind = [0] * (config.heads.stages - 1)
    if parallel.partition == "uniform":
        return (*[layers // trunk_stages] * trunk_stages, *behind)
    if not isinstance(parallel.partition, str):
        return parallel.partition
    if parallel.schedule == "dualpipev":
        return split_dual_pipe_v(costs, layers, [costs.num_heads, *[0] * (parallel.pipeline - 1)], fits)
    return split_layers(
        layers,
        [*fewest_layers(trunk_stages, config.train.low_rank is None), *behind],
        lambda stage, n: costs.stage(Stage(n, heads[stage]), stage == 0, stage == trunk_stages - 1).total,
        lambda stage, n: (stage < trunk_stages or n == 0) and fits(stage, [Stage(n, heads[stage])]),
    )
