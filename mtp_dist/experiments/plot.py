"""The plot of an experiment's result: means with their 95 % intervals, and the single runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mtp_dist.experiments.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Point(NamedTuple):
    """A cell's value of a metric."""

    interval: Mapping[str, Any]
    runs: list[float]
    """Value of each run."""


Points = dict[str, Point]
"""Values by position on the horizontal axis."""
OFFSET = 0.06
"""Horizontal distance between lines, so that intervals do not cover each other."""
MAX_TICKS = 16
"""Largest number of labels on the horizontal axis."""


def draw(result: Result, path: Path) -> None:
    """Write a PNG file with one line per arm, or per cell if the horizontal axis shows several metrics."""
    from matplotlib.figure import Figure  # half a second

    plot = result["plot"]
    lines = _metric_lines(result) if "*" in plot["metric"] else _axis_lines(result)
    positions = list(dict.fromkeys(position for points in lines.values() for position in points))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, points) in enumerate(lines.items()):
        _draw_line(axes, label, points, positions, (number - (len(lines) - 1) / 2) * OFFSET)
    every = -(-len(positions) // MAX_TICKS)
    axes.set_xticks(range(0, len(positions), every), positions[::every])
    axes.set(title=result["title"], xlabel=plot["x_label"] or plot["x"] or "", ylabel=plot["label"] or plot["metric"])
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _axis_lines(result: Result) -> dict[str, Points]:
    """Return the plotted metric by the axis on the horizontal, one line per cell of the other axes."""
    plot = result["plot"]
    lines: dict[str, Points] = {}
    for cell in result["cells"]:
        label = ", ".join(arm for axis, arm in cell["cell"].items() if axis != plot["x"])
        points = lines.setdefault(label, {})
        if plot["metric"] in cell["metrics"]:
            points[cell["cell"][plot["x"]]] = _point(result, cell, plot["metric"])
    return lines


def _metric_lines(result: Result) -> dict[str, Points]:
    """Return the metrics that match, by the part that the `*` stands for, one line per cell."""
    pattern = re.compile(re.escape(result["plot"]["metric"]).replace(r"\*", "(.+)"))
    return {
        ", ".join(cell["cell"].values()): {
            match[1]: _point(result, cell, name) for name in cell["metrics"] if (match := pattern.fullmatch(name))
        }
        for cell in result["cells"]
    }


def _point(result: Result, cell: Mapping[str, Any], metric: str) -> Point:
    values = (run["metrics"].get(metric) for run in result["runs"] if run["cell"] == cell["cell"])
    return Point(cell["metrics"][metric], [value for value in values if value is not None])


def _draw_line(axes: Axes, label: str, points: Points, positions: list[str], offset: float) -> None:
    x = [positions.index(position) + offset for position in points]
    means = [point.interval["mean"] for point in points.values()]
    errors = [point.interval["half_width"] or 0.0 for point in points.values()]
    line = axes.errorbar(x, means, errors, fmt="o-", capsize=3, label=label)[0]
    for position, point in zip(x, points.values(), strict=True):
        axes.plot([position] * len(point.runs), point.runs, ".", color=line.get_color(), alpha=0.5)
