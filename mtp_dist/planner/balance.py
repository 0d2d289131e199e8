"""Arrangements of layers and heads over the ranks of a pipeline, and how well each of them shares the work."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mtp_dist.planner.partition import fewest_layers, split_dual_pipe_v, split_heads, split_layers
from mtp_dist.planner.parts import Parts, Passes, Stage
from mtp_dist.planner.schedule import ScheduleName

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
NO_ROOM = -(2**31)
"""Layers of a rank that has no room for its heads, or for its fewest layers."""


@dataclass(frozen=True)
class Arrangement:
    """The stages of a pipeline, in the order of the layers."""

    stages: tuple[Stage, ...]
    schedule: ScheduleName = "1f1b"
    """`dualpipev` has two stages per rank: r and 2p - 1 - r of p ranks."""

    @property
    def ranks(self) -> int:
        return len(self.stages) // (2 if self.schedule == "dualpipev" else 1)

    def passes(self, parts: Parts) -> list[Passes]:
        """Return the costs of each stage."""
        return parts.stages(self.stages)

    def rank_costs(self, parts: Parts) -> list[float]:
        """Return the cost of each rank's stages."""
        costs = [passes.total for passes in self.passes(parts)]
        if self.schedule == "1f1b":
            return costs
        return [costs[rank] + costs[-1 - rank] for rank in range(self.ranks)]

    def balance(self, parts: Parts) -> float:
        """Return the mean cost of the ranks relative to the slowest one: the largest fraction of time they can work."""
        return _balance(self.rank_costs(parts))


def arrangements(parts: Parts, layers: int, ranks: int) -> dict[str, Arrangement]:
    """Return the arrangements to choose from, without those that have a stage between the first and the last that is
    empty. `uniform` gives the odd layers to the first stages, the others make the slowest rank as fast as possible.
    """
    share, odd = divmod(layers, ranks)
    no_heads = [0] * (ranks - 1)
    even = tuple(Stage(share + (rank < odd), heads) for rank, heads in enumerate([*no_heads, parts.num_heads]))
    found = {
        "uniform": [Arrangement(even)] if layers >= ranks - 1 else [],
        "balanced": _heads_on_last_stages(parts, layers, [[*no_heads, parts.num_heads]]),
        "balanced, split heads": _heads_on_last_stages(parts, layers, _split_heads(parts.num_heads, ranks)),
        "dualpipev": _dual_pipe_v(parts, layers, [[parts.num_heads, *no_heads]]),
        "dualpipev, split heads": _dual_pipe_v(
            parts, layers, _shares(parts, layers, ranks, lambda rank, holders: (rank > 0) + (rank >= holders))
        ),
    }
    return {name: max(several, key=lambda each: each.balance(parts)) for name, several in found.items() if several}


def optimum(parts: Parts, layers: int, ranks: int) -> float:
    """Return the best balance of whole layers and heads over ranks, if they could be in any order."""
    best = 0.0
    for heads in _shares(parts, layers, ranks, lambda rank, holders: 0):
        with_head_1 = sum(count > 0 for count in heads) - 1
        split = _split(parts, layers, heads, [0] * ranks, with_head_1)
        assert split, "no rank needs a layer"
        stages = enumerate(map(Stage, split, heads))
        best = max(best, _balance([parts.stage(each, rank == 0, rank == with_head_1).total for rank, each in stages]))
    return best


def _balance(costs: Sequence[float]) -> float:
    """Return the mean of the ranks' costs relative to the largest one."""
    return sum(costs) / (len(costs) * max(costs))


def _heads_on_last_stages(parts: Parts, layers: int, heads_by_stage: Iterable[Sequence[int]]) -> list[Arrangement]:
    """Return 1F1B with each distribution of heads. The trunk ends on the first stage with heads, which all read z."""
    found = []
    for heads in heads_by_stage:
        trunk_stages = sum(count == 0 for count in heads) + 1
        split = _split(parts, layers, heads[:trunk_stages], fewest_layers(trunk_stages), trunk_stages - 1)
        if split:
            found.append(Arrangement(tuple(map(Stage, [*split, *[0] * (len(heads) - trunk_stages)], heads))))
    return found


def _split_heads(heads: int, ranks: int) -> Iterator[list[int]]:
    """Yield the heads of each stage of 1F1B, on any number of last stages."""
    for holders in range(1, min(heads, ranks) + 1):
        yield from split_heads(heads, ranks, holders)


def _dual_pipe_v(parts: Parts, layers: int, heads_by_rank: Iterable[Sequence[int]]) -> list[Arrangement]:
    """Return DualPipeV with each distribution of heads, those of rank r on stage 2p - 1 - r of p ranks."""
    found = []
    for heads in heads_by_rank:
        split = split_dual_pipe_v(parts, layers, heads, lambda rank, stages: True)
        if split:
            by_stage = [*[0] * len(heads), *reversed(heads)]
            found.append(Arrangement(tuple(map(Stage, split, by_stage)), "dualpipev"))
    return found


def _split(
    parts: Parts, layers: int, heads: Sequence[int], fewest: Sequence[int], with_head_1: int
) -> tuple[int, ...] | None:
    """Return the layers of each stage or rank, given its heads, that balance best; None if there are too few.

    with_head_1: index of the one that has head 1.
    """

    def cost(index: int, count: int) -> float:
        return parts.stage(Stage(count, heads[index]), index == 0, index == with_head_1).total

    return split_layers(layers, fewest, cost, lambda index, count: True)


def _shares(parts: Parts, layers: int, ranks: int, fewest: Callable[[int, int], int]) -> Iterator[list[int]]:
    """Yield the heads of each rank that make the slowest rank as fast as possible, for each number of ranks with heads.

    Those are the first ones, and the last of them has head 1. fewest: smallest number of layers of a rank, given with
    the number of ranks with heads. The slowest rank's cost is that of some layers and heads: bisection finds the
    smallest that suffices.
    """
    numbers = np.arange(parts.num_heads + 1)
    costs = {kind: _cost_table(parts, layers, *kind) for kind in product((False, True), repeat=2)}
    candidates = np.unique(np.concatenate([*costs.values()], axis=None))
    for holders in range(1, min(parts.num_heads, ranks) + 1):

        def shares(slowest: float, holders: int = holders) -> list[int] | None:
            rooms = []
            for rank in range(ranks):
                cost = costs[rank == 0, rank == holders - 1]
                room = (cost <= slowest).sum(axis=1) - 1  # more layers cost more
                allowed = (room >= fewest(rank, holders)) & ((numbers > 0) == (rank < holders))
                rooms.append(np.where(allowed, room, NO_ROOM))
            return _most_room(rooms, layers)

        index = bisect_left(candidates, True, key=lambda slowest: shares(slowest) is not None)
        if index < len(candidates) and (found := shares(candidates[index])):
            yield found


def _cost_table(parts: Parts, layers: int, is_first: bool, has_head_1: bool) -> FloatArray:
    """Return the costs of a rank by its number of heads and of layers, `[heads + 1, layers + 1]`."""
    numbers = product(range(parts.num_heads + 1), range(layers + 1))
    costs = [parts.stage(Stage(count, heads), is_first, has_head_1).total for heads, count in numbers]
    return np.array(costs).reshape(parts.num_heads + 1, layers + 1)


def _most_room(rooms: Sequence[IntArray], layers: int) -> list[int] | None:
    """Return the heads of each rank that leave room for the most layers; None if those are fewer than `layers`.

    rooms: for each rank the largest number of layers by its number of heads.
    """
    numbers = np.arange(len(rooms[0]))
    rest = numbers[:, None] - numbers  # heads of the ranks before, by heads of all and of the rank
    most, choices = rooms[0], []
    for room in rooms[1:]:
        totals = np.where(rest >= 0, most[rest] + room, NO_ROOM)
        choices.append(totals.argmax(axis=1))
        most = totals.max(axis=1)
    if most[-1] < layers:
        return None
    left, heads = len(numbers) - 1, []
    for choice in reversed(choices):
        heads.append(int(choice[left]))
        left -= heads[-1]
    return [left, *reversed(heads)]
