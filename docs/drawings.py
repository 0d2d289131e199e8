"""Drawings that are made of no data: `python docs/drawings.py` draws them again."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from mtp_dist.config.heads import KINDS, KindName

IMAGES = Path(__file__).parent / "images"
SHARED, OWN, TENSOR = "#dcdcdc", "#b9d7f2", "#fff2c4"
LINE = "#222222"

# Lengths are in units of the distance between two heads.
WIDTH, HEIGHT = 12.8, 13.5
INCHES = 9.2 / WIDTH
BOX_HEIGHT = 0.52
COLUMNS = (0.55, 1.55, 2.55)
"""Positions of the heads in a narrow panel."""

Point = tuple[float, float]


def panel(figure: Figure, corner: Point, size: Point, kind: str, comment: str) -> Axes:
    """Add axes in these units with their lower left corner at `corner`, the kind and a comment on top."""
    (x, y), (width, height) = corner, size
    axes = figure.add_axes((x / WIDTH, y / HEIGHT, width / WIDTH, height / HEIGHT))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    axes.text(width / 2, height - 0.3, kind, ha="center", va="center", fontsize=12, fontweight="bold")
    axes.text(width / 2, height - 0.7, comment, ha="center", va="center", fontsize=9)
    return axes


def box(axes: Axes, middle: Point, text: str, color: str, width: float = 0.66, height: float = BOX_HEIGHT) -> None:
    corner = middle[0] - width / 2, middle[1] - height / 2
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, linewidth=0.8, edgecolor="#444444", facecolor=color)
    )
    axes.text(*middle, text, ha="center", va="center", fontsize=9.5, linespacing=1.1)


def bar(axes: Axes, columns: Sequence[float], y: float, text: str, color: str = SHARED) -> None:
    """Draw one box below or above several columns."""
    box(axes, ((columns[0] + columns[-1]) / 2, y), text, color, columns[-1] - columns[0] + 1)


def arrow(axes: Axes, *points: Point) -> None:
    """Draw an arrow along straight lines from point to point."""
    axes.plot(*zip(*points[:-1], strict=True), color=LINE, linewidth=1)
    style = {"arrowstyle": "-|>", "linewidth": 1, "color": LINE, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def rise(axes: Axes, x: float, lower: float, upper: float) -> None:
    """Draw an arrow from the box at height `lower` up to the one at height `upper`."""
    arrow(axes, (x, lower + BOX_HEIGHT / 2), (x, upper - BOX_HEIGHT / 2))


def predictions(axes: Axes, columns: Sequence[float], y: float) -> None:
    """Draw the predictions of each head above the unembedding at height y."""
    for k, x in enumerate(columns, 1):
        arrow(axes, (x, y + BOX_HEIGHT / 2), (x, y + 0.6))
        axes.text(x, y + 0.8, f"$x_{{t+{k}}}$", ha="center", va="center", fontsize=12)
        axes.text(x, y + 1.17, f"head {k}", ha="center", va="center", fontsize=9)


def draw_blocks(axes: Axes, kind: KindName, block: str) -> None:
    """Draw a kind whose blocks stand between z and the final norm."""
    reads = KINDS[kind].reads
    readers = {"trunk": COLUMNS, "previous head": COLUMNS[:1], "next head": COLUMNS[-1:]}[reads]
    bar(axes, readers, 0.4, "$z$", TENSOR)
    bar(axes, COLUMNS, 2.3, "norm $N$")
    bar(axes, COLUMNS, 3.2, "unembedding $U$")
    predictions(axes, COLUMNS, 3.2)
    for k, x in enumerate(COLUMNS, 1):
        box(axes, (x, 1.35), f"${block}_{k}$", OWN)
        rise(axes, x, 1.35, 2.3)
        rise(axes, x, 2.3, 3.2)
    for x in readers:
        rise(axes, x, 0.4, 1.35)
    for x in COLUMNS[:-1]:
        ends = (x + 0.33, 1.35), (x + 0.67, 1.35)
        if reads != "trunk":
            arrow(axes, *(ends if reads == "previous head" else ends[::-1]))


def draw_mlp(axes: Axes) -> None:
    columns = (0.55, 1.75, 2.95)
    bar(axes, columns, 0.4, "$z$", TENSOR)
    bar(axes, columns, 1.25, "norm $N$:  $y = N(z)$")
    bar(axes, columns, 3.2, "unembedding $U$")
    predictions(axes, columns, 3.2)
    for k, x in enumerate(columns, 1):
        rise(axes, x, 0.4, 1.25)
        rise(axes, x, 1.25, 3.2 if k == 1 else 2.2)
        if k > 1:
            box(axes, (x, 2.25), f"$y\\,+$\n$\\mathrm{{SiLU}}(W_{k}y)$", OWN, 1, 0.66)
            arrow(axes, (x, 2.58), (x, 3.2 - BOX_HEIGHT / 2))


def draw_sequential(axes: Axes) -> None:
    """Draw head 1 and the blocks of heads 2 and 3 from left to right, each with its hidden states (h) and token (e)."""
    columns, hnorms, apart = (0.6, 3.0, 6.3), (2.25, 5.55), 1.5
    bar(axes, (columns[0], hnorms[0]), 0.9, "$z$", TENSOR)
    bar(axes, (hnorms[0] + apart, hnorms[1] + apart), 0.9, "the trunk's embedding $E$")
    bar(axes, columns, 4.65, "norm $N$")
    bar(axes, columns, 5.5, "unembedding $U$")
    predictions(axes, columns, 5.5)
    rise(axes, columns[0], 0.9, 4.65)
    rise(axes, hnorms[0], 0.9, 1.8)
    for x in columns:
        rise(axes, x, 4.65, 5.5)
    for k, left in enumerate(hnorms, 2):
        middle, right = left + apart / 2, left + apart
        axes.text(right, 0.24, f"token $x_{{t+{k - 1}}}$", ha="center", va="center", fontsize=11)
        arrow(axes, (right, 0.4), (right, 0.9 - BOX_HEIGHT / 2))
        rise(axes, right, 0.9, 1.8)
        for x, name in ((left, f"hnorm$_{k}$"), (right, f"enorm$_{k}$")):
            box(axes, (x, 1.8), name, OWN, 1.15)
            rise(axes, x, 1.8, 2.65)
        box(axes, (middle, 2.65), f"$M_{k}$ [enorm; hnorm]", OWN, apart + 1.15)
        rise(axes, middle, 2.65, 3.5)
        box(axes, (middle, 3.5), f"$T_{k}$", OWN)
        rise(axes, middle, 3.5, 4.65)
    state, gap = (columns[1], 4.05), (columns[1] + columns[2]) / 2
    axes.plot(*state, "o", color=LINE, markersize=4)
    arrow(axes, state, (gap, state[1]), (gap, 1.8), (hnorms[1] - 0.575, 1.8))


def draw_legend(figure: Figure, corner: Point) -> None:
    axes = panel(figure, corner, (4, 2.3), "", "")
    axes.add_patch(Rectangle((0.02, 0.05), 3.7, 2.1, linewidth=0.6, edgecolor="#999999", facecolor="none"))
    meanings = ((TENSOR, "output of the trunk"), (SHARED, "weights that all heads share"), (OWN, "weights of one head"))
    for row, (color, meaning) in enumerate(meanings):
        box(axes, (0.45, 1.85 - 0.5 * row), "", color, 0.5, 0.34)
        axes.text(0.85, 1.85 - 0.5 * row, meaning, va="center", fontsize=9)
    axes.text(0.2, 0.33, "$T$: transformer layers   $W, M$: matrices", va="center", fontsize=9)


def main() -> None:
    figure = plt.figure(figsize=(WIDTH * INCHES, HEIGHT * INCHES))
    kinds = (
        ("parallel", "T", "every head reads $z$"),
        ("causal", "T", "head $k$ reads head $k-1$"),
        ("anticausal", "T", "head $k$ reads head $k+1$"),
        ("linear", "W", "one matrix a head"),
    )
    for place, (kind, block, comment) in enumerate(kinds):
        draw_blocks(panel(figure, (0.1 + 3.2 * place, 8.05), (3.1, 5.45), kind, comment), kind, block)
    draw_mlp(panel(figure, (0.1, 2.45), (3.5, 5.5), "mlp", "head 1 has no block"))
    comment = "from head 2 on, each head also reads the token before its target"
    draw_sequential(panel(figure, (4.6, 0), (8.1, 7.95), "sequential", comment))
    draw_legend(figure, (0.1, 0))
    figure.savefig(IMAGES / "heads.png", dpi=110)


if __name__ == "__main__":
    main()
