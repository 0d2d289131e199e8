"""Pictures of pipeline schedules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_dist.planner.schedule import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    ("forward", 0): "#9ecae1",
    ("forward", 1): "#4292c6",
    ("backward", 0): "#fdbe85",
    ("backward", 1): "#e6802c",
}
"""Colors by kind and phase of a pass."""
MIN_NUMBERED = 1 / 75
"""Smallest part of the picture's width in which a pass has room for the number of its micro-batch."""


def draw_timelines(timelines: Mapping[str, Timeline], path: Path, unit: str = "seconds") -> None:
    """Draw each timeline by its title, all on the same scale, into a file of the format that its name ends with."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [1.2 + 0.32 * timeline.ranks for timeline in timelines.values()]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    grid = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    longest = max(timeline.seconds for timeline in timelines.values())
    for axes, (title, timeline) in zip(grid, timelines.items(), strict=True):
        _draw(axes, timeline, longest * MIN_NUMBERED)
        axes.set_title(
            f"{title}: {timeline.seconds:,.3g} {unit}, ranks work {1 - timeline.bubble:.0%} of the time", fontsize=10
        )
    grid[-1].set_xlabel(unit)
    kinds = dict.fromkeys((each.kind, each.phase) for timeline in timelines.values() for each in timeline.passes)
    labels = {0: "", 1: ", second stage of the rank"}
    patches = [Patch(color=COLORS[kind], label=f"{kind[0]}{labels[kind[1]]}") for kind in sorted(kinds)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, timeline: Timeline, min_numbered: float) -> None:
    """Draw the bars of each rank. min_numbered: duration from which a pass has a number."""
    for kind, color in COLORS.items():
        passes = [each for each in timeline.passes if (each.kind, each.phase) == kind]
        for rank in range(timeline.ranks):
            bars = [(each.start, each.end - each.start) for each in passes if each.rank == rank]
            axes.broken_barh(bars, (rank - 0.42, 0.84), facecolor=color, edgecolor="white", linewidth=0.5)
        for each in passes:
            if each.end - each.start >= min_numbered:
                middle = (each.start + each.end) / 2
                axes.text(middle, each.rank, str(each.micro_batch + 1), ha="center", va="center", fontsize=6)
    axes.set(ylim=(timeline.ranks - 0.5, -0.5), ylabel="rank", yticks=range(timeline.ranks))
    axes.spines[["top", "right"]].set_visible(False)
