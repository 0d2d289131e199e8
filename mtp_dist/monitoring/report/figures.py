"""Pictures of the curves of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from mtp_dist.monitoring.report.run_files import RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_IN_A_ROW = 4
PANEL_INCHES = (3.3, 2.8)
"""Width and height of a panel, in inches."""
RATES = {
    "throughput": ("throughput/tokens_per_second", "tokens/s", 1.0),
    "memory": ("memory/peak_bytes", "peak memory of a rank (GB)", 1e-9),
    "gradient-norm": ("train/grad_norm", "gradient norm", 1.0),
    "learning-rate": ("train/learning_rate", "learning rate", 1.0),
}
"""Scalar, label and factor by file name."""


def draw(runs: Sequence[RunFiles]) -> dict[str, bytes]:
    """Return PNG files by name. If there are several runs, curves by head have a panel per head, else one for all."""
    pictures = {"training-loss": _curves(runs, "loss/head", "training loss (nats)")}
    for prefix in dict.fromkeys(prefix for run in runs for prefix in run.validation_prefixes()):
        name, label = prefix.replace("/", "-"), prefix.replace("/", " on ")
        pictures[f"{name}-loss"] = _curves(runs, f"{prefix}/loss/head", f"{label} (nats)")
        rates = f"{prefix}/draft_acceptance_rate_pos"
        pictures[f"{name}-acceptance"] = _curves(runs, rates, f"{label}: drafts accepted", "distance")
    pictures |= {name: _rate(runs, *arguments) for name, arguments in RATES.items()}
    return {name: picture for name, picture in pictures.items() if picture}


def _curves(runs: Sequence[RunFiles], prefix: str, label: str, number: str = "head") -> bytes | None:
    scalars = max((run.scalars(prefix) for run in runs), key=len)
    if not scalars:
        return None
    if len(runs) == 1:
        figure, grid = _panels(1)
        for scalar in scalars:
            _plot(grid[0], runs[0], scalar, f"{number} {scalar.rpartition('_')[2]}")
        _mark_restarts(grid[0], runs[0])
    else:
        figure, grid = _panels(len(scalars))
        for axes, scalar in zip(grid, scalars, strict=True):
            for run in runs:
                _plot(axes, run, scalar, _legend_label(run.name))
            axes.set(title=f"{number} {scalar.rpartition('_')[2]}")
    grid[0].set(ylabel=label)
    grid[0].legend(fontsize=8)
    return _png(figure)


def _rate(runs: Sequence[RunFiles], scalar: str, label: str, factor: float) -> bytes:
    figure, [axes] = _panels(1)
    for run in runs:
        _plot(axes, run, scalar, _legend_label(run.name), factor)
        _mark_restarts(axes, run)
    axes.set(ylabel=label)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend(fontsize=8)
    return _png(figure)


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(number, PANELS_IN_A_ROW)
    rows = -(-number // columns)
    wide = 2 if number == 1 else 1
    figure = Figure(figsize=(columns * PANEL_INCHES[0] * wide, rows * PANEL_INCHES[1]), layout="constrained")
    grid = [figure.add_subplot(rows, columns, index + 1) for index in range(number)]
    for axes in grid:
        axes.grid(alpha=0.3)
        axes.set(xlabel="step")
    return figure, grid


def _plot(axes: Axes, run: RunFiles, scalar: str, label: str, factor: float = 1.0) -> None:
    curve = run.curve(scalar)
    marker = "o" if len(curve) < 20 else None
    steps, values = [step for step, _ in curve], [factor * value for _, value in curve]
    axes.plot(steps, values, label=label, linewidth=1.2, marker=marker, markersize=3)


def _legend_label(name: str) -> str:
    """Return the name as a label: matplotlib leaves labels that begin with an underscore out of a legend."""
    return f" {name}" if name.startswith("_") else name


def _mark_restarts(axes: Axes, run: RunFiles) -> None:
    for step in run.restarts:
        axes.axvline(step, color="#888888", linewidth=0.8, linestyle=":")


def _png(figure: Figure) -> bytes:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name such as a$b$c is not a formula
    stream = BytesIO()
    figure.savefig(stream, dpi=140, format="png")
    return stream.getvalue()
