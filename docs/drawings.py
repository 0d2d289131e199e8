"""Drawings that are made of no data: `python docs/drawings.py` draws them again."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

IMAGES = Path(__file__).parent / "images"
BLOCK, PLAIN, OUTPUT = "#cfe2f3", "#eeeeee", "#d9ead3"
KINDS = {
    "parallel": "T{k}",
    "causal": "T{k}",
    "anticausal": "T{k}",
    "linear": "W{k}",
    "mlp": "y+SiLU(W{k} y)",
    "sequential": "T{k}, M{k}",
}


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 0.8) -> None:
    style = {"boxstyle": "round,pad=0.02", "linewidth": 0.8, "edgecolor": "#555555", "facecolor": color}
    axes.add_patch(matplotlib.patches.FancyBboxPatch((x - width / 2, y - 0.22), width, 0.44, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=7)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "linewidth": 0.9, "color": "#333333"})


def draw_kind(axes: Axes, kind: str, heads: int = 3) -> None:
    """Trunk at the bottom, blocks above, then norm and unembedding, the predicted token on top."""
    box(axes, (heads + 1) / 2, 0, "trunk: z", PLAIN, heads)
    before_norm = kind != "mlp"
    for k in range(1, heads + 1):
        y_block, y_norm = (1.2, 2.2) if before_norm else (2.2, 1.2)
        has_block = k > 1 or kind not in ("mlp", "sequential")
        box(axes, k, y_norm, "N", PLAIN)
        if has_block:
            box(axes, k, y_block, KINDS[kind].format(k=k), BLOCK, 0.85 if kind == "mlp" else 0.8)
        box(axes, k, 3.2, "U", PLAIN)
        axes.text(k, 3.85, f"x[t+{k}]", ha="center", va="center", fontsize=8)
        arrow(axes, (k, 3.42), (k, 3.72))
        lower, upper = (y_block, y_norm) if before_norm else (y_norm, y_block)
        if has_block:
            arrow(axes, (k, 1.42), (k, 1.98))
        arrow(axes, (k, (upper if has_block or before_norm else lower) + 0.22), (k, 2.98))
        reads_trunk = {"causal": k == 1, "anticausal": k == heads, "sequential": k == 1}.get(kind, True)
        if reads_trunk:
            arrow(axes, (k, 0.22), (k, (1.2 if has_block or not before_norm else 2.2) - 0.22))
        if kind == "causal" and k > 1:
            arrow(axes, (k - 0.6, 1.2), (k - 0.4, 1.2))
        if kind == "anticausal" and k < heads:
            arrow(axes, (k + 0.6, 1.2), (k + 0.4, 1.2))
        if kind == "sequential" and k > 1:
            arrow(axes, (k - 0.98, 0.75) if k == 2 else (k - 0.6, 1.2), (k - 0.41, 1.1 if k == 2 else 1.2))
            axes.text(k, 0.5, f"E x[t+{k - 1}]", ha="center", va="center", fontsize=7)
            arrow(axes, (k, 0.62), (k, 0.97))
    axes.set(xlim=(0.4, heads + 0.6), ylim=(-0.35, 4.1), title=kind)
    axes.axis("off")


def main() -> None:
    figure, grid = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
    for axes, kind in zip(grid.flat, KINDS, strict=True):
        draw_kind(axes, kind)
    figure.savefig(IMAGES / "heads.png", dpi=110)


if __name__ == "__main__":
    main()
