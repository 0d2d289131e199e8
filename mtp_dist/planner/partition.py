"""Trunk layers of each pipeline stage. The first stage also has the embedding, the last stage all heads."""

import heapq
from collections.abc import Callable, Sequence
from typing import Literal

from mtp_dist.config import Config
from mtp_dist.errors import ConfigError
from mtp_dist.planner.memory import rank_memory
from mtp_dist.planner.parts import Parts, Stage, part_flops

StageCost = Callable[[int, int], float]
"""Cost of a stage, counted from 0, that holds so many trunk layers; more layers never cost less."""
StageFits = Callable[[int, int], bool]
"""Whether a stage with so many trunk layers fits the memory; if it does, fewer layers fit too."""


def split_layers(layers: int, fewest: Sequence[int], cost: StageCost, fits: StageFits) -> tuple[int, ...] | None:
    """Return the layers of each stage that make the slowest stage as fast as possible; None if no split fits.

    fewest: smallest number of layers of each stage. Each further layer goes to the stage that is the fastest with it.
    That is optimal because more layers cost more: as long as layers are left, some stage can take one within the
    optimum's bound, and so can the fastest. Of stages that are equally fast the last one gets the layer: the first ones
    keep the most micro-batches in flight.
    """
    split = list(fewest)
    if sum(split) > layers or not all(fits(stage, count) for stage, count in enumerate(split)):
        return None
    queue = [(cost(stage, count + 1), -stage) for stage, count in enumerate(split) if fits(stage, count + 1)]
    heapq.heapify(queue)
    for _ in range(layers - sum(split)):
        if not queue:
            return None
        stage = -queue[0][1]
        split[stage] += 1
        if fits(stage, split[stage] + 1):
            heapq.heapreplace(queue, (cost(stage, split[stage] + 1), -stage))
        else:
            heapq.heappop(queue)
    return tuple(split)


def fewest_layers(stages: int, trained_embedding: bool = True) -> list[int]:
    """Return the smallest number of trunk layers of each stage: one if it has no other weight that is trained."""
    others = {stages - 1} | ({0} if trained_embedding else set())
    return [int(stage not in others) for stage in range(stages)]


def split_dual_pipe_v(parts: Parts, layers: int, heads: Sequence[int], fits: StageFits) -> tuple[int, ...] | None:
    """Return the trunk layers of each of 2p stages, of which rank r of p has r and 2p - 1 - r; None if none fits.

    heads: number of heads on each rank, all on its second stage, those with heads first. fits: for ranks. A rank's
    layers are split so that both of its stages take equally long.
    """
    holders = sum(count > 0 for count in heads)
    # The trunk ends on the first stage with heads: ranks before that have no layer behind.
    fewest = [(rank > 0) + (rank >= holders) for rank in range(len(heads))]
    split = split_layers(layers, fewest, lambda rank, n: parts.stage(Stage(n, heads[rank]), rank == 0).total, fits)
    if split is None:
        return None
    second = []
    for rank, (count, heads_of_rank) in enumerate(zip(split, heads, strict=True)):
        worth = parts.stage(Stage(0, heads_of_rank), is_first=False).total / parts.layer.total
        most = 0 if rank < holders - 1 else count - (rank > 0)
        second.append(min(most, max(int(rank >= holders), int((count - worth + 1) // 2))))
    return (*(count - behind for count, behind in zip(split, second, strict=True)), *reversed(second))


def fits_memory(config: Config, device_bytes: float, device: Literal["cpu", "cuda"] = "cuda") -> StageFits:
    """Return whether a stage of 1F1B fits the memory of its device, with the micro-batches that it has in flight."""

    def fits(stage: int, layers: int) -> bool:
        in_flight = min(config.parallel.pipeline - stage, config.micro_batches)
        return rank_memory(config, stage, layers, in_flight, device).total <= device_bytes

    return fits


def trunk_layers_per_stage(
    config: Config, parts: Parts | None = None, fits: StageFits | None = None
) -> tuple[int, ...]:
    """Return the number of trunk layers of each stage, first stage first. `dualpipev` has two stages per rank.

    parts: costs that `balanced` and `measured` split by; by default FLOPs, with which `measured` is `balanced` until
    the run has measured. fits: such as `fits_memory`; by default every stage does. Raise ConfigError if no split fits.
    """
    stages, layers = config.parallel.stages, config.model.trunk_layers
    if config.parallel.partition == "uniform":
        return (layers // stages,) * stages
    if not isinstance(config.parallel.partition, str):
        return config.parallel.partition
    costs, fits = parts or part_flops(config), fits or (lambda stage, count: True)

    def cost(stage: int, count: int) -> float:
        return costs.stage(Stage(count, costs.num_heads * (stage == stages - 1)), stage == 0).total

    if config.parallel.schedule == "dualpipev":
        split = split_dual_pipe_v(costs, layers, [costs.num_heads, *[0] * (config.parallel.pipeline - 1)], fits)
    else:
        split = split_layers(layers, fewest_layers(stages, config.train.low_rank is None), cost, fits)
    if split is None:
        raise ConfigError(
            f"no split of model.trunk_layers = {layers} over parallel.pipeline = {stages} stages fits the memory: "
            "raise parallel.pipeline or parallel.tensor, or lower train.micro_batch_size"
        )
    return split
