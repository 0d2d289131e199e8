"""Arrangements of layers and heads over the ranks of a pipeline, and how well each of them shares the work."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mtp_dist.planner.partition import fewest_layers, split_dual_pipe_v, split_heads, split_layers
from mtp_dist.planner.parts import Parts, Passes, Stage
from mtp_dist.planner.schedule import ScheduleName


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
        return [parts.stage(stage, is_first=index == 0) for index, stage in enumerate(self.stages)]

    def rank_costs(self, parts: Parts) -> list[float]:
        """Return the cost of each rank's stages."""
        costs = [passes.total for passes in self.passes(parts)]
        if self.schedule == "1f1b":
            return costs
        return [costs[rank] + costs[-1 - rank] for rank in range(self.ranks)]

    def balance(self, parts: Parts) -> float:
        """Return the mean cost of the ranks relative to the slowest one: the largest fraction of time they can work."""
        costs = self.rank_costs(parts)
        return sum(costs) / (len(costs) * max(costs))


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
        "dualpipev, split heads": _dual_pipe_v(parts, layers, _shares(parts.num_heads, ranks)),
    }
    return {name: max(several, key=lambda each: each.balance(parts)) for name, several in found.items() if several}


def optimum(parts: Parts, layers: int, ranks: int) -> float:
    """Return the best balance of whole layers and heads over ranks, if they could be in any order."""
    best = 0.0
    for heads in _shares(parts.num_heads, ranks):
        split = _split(parts, layers, heads, [0] * ranks)
        assert split, "no rank needs a layer"
        best = max(best, Arrangement(tuple(map(Stage, split, heads))).balance(parts))
    return best


def _heads_on_last_stages(parts: Parts, layers: int, heads_by_stage: Iterable[Sequence[int]]) -> list[Arrangement]:
    """Return 1F1B with each distribution of heads. The trunk ends on the first stage with heads, which all read z."""
    found = []
    for heads in heads_by_stage:
        trunk_stages = sum(count == 0 for count in heads) + 1
        split = _split(parts, layers, heads[:trunk_stages], fewest_layers(trunk_stages))
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
        split = split_dual_pipe_v(parts, layers, heads, lambda rank, n: True)
        if split:
            by_stage = [*[0] * len(heads), *reversed(heads)]
            found.append(Arrangement(tuple(map(Stage, split, by_stage)), "dualpipev"))
    return found


def _split(parts: Parts, layers: int, heads: Sequence[int], fewest: Sequence[int]) -> tuple[int, ...] | None:
    """Return the layers of each stage or rank with so many heads that balance best; None if there are too few."""
    return split_layers(
        layers, fewest, lambda rank, n: parts.stage(Stage(n, heads[rank]), rank == 0).total, lambda rank, n: True
    )


def _shares(heads: int, ranks: int) -> Iterator[list[int]]:
    """Yield the ways to share heads among ranks, in descending order and with zeros."""
    yield from ([*some, *[0] * (ranks - len(some))] for some in _summands(heads, ranks, heads))


def _summands(total: int, most: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Yield the ways to write a number as a sum of at most so many, in descending order and none above the largest."""
    if total == 0:
        yield ()
    elif most:
        for first in range(min(total, largest), 0, -1):
            yield from ((first, *rest) for rest in _summands(total - first, most - 1, first))
