"""The picture of docs/architecture.md: `python docs/draw_architecture.py` draws it again."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

Point = tuple[float, float]

PACKAGES: dict[str, tuple[Point, str]] = {
    "cli, bench, pretrain.py": ((2.0, 6.3), "commands, benchmarks, the training program"),
    "run.py": ((6.2, 6.3), "one run: resume, build, train, summarize"),
    "verify": ((10.4, 6.3), "selfcheck, preflight, start-up checks"),
    "training": ((2.0, 5.0), "trainer: the loop, rollback, stop signals"),
    "monitoring": ((6.2, 5.0), "scalars, writers, events, report"),
    "convert, inference": ((10.4, 5.0), "Hugging Face export and import, sampling"),
    "data": ((2.0, 3.7), "sources, samples, data loader"),
    "engine": ((6.2, 3.7), "DeepSpeed pipeline, optimizer, gradients"),
    "checkpoint": ((10.4, 3.7), "format, reader, save, restore"),
    "model": ((2.0, 2.4), "trunk, heads, reference"),
    "loss": ((6.2, 2.4), "heads one after the other, kernel"),
    "planner": ((10.4, 2.4), "FLOPs, bytes, partition"),
    "distributed": ((4.1, 1.1), "devices, process groups, rendezvous"),
    "config, fs, metrics, errors": ((8.3, 1.1), "every key, files, records of a step"),
}
WIDTH, HEIGHT = 3.7, 0.86
BATCH, METRIC, CHECKPOINT = "#1f77b4", "#d62728", "#2ca02c"
PATHS: list[tuple[str, list[Point], Point]] = [
    (BATCH, [(3.85, 3.82), (4.35, 3.82)], (4.1, 3.98)),
    (BATCH, [(5.3, 3.27), (3.0, 2.83)], (3.72, 3.1)),
    (BATCH, [(3.85, 2.4), (4.35, 2.4)], (4.1, 2.2)),
    (METRIC, [(6.5, 2.83), (6.5, 3.27)], (6.72, 3.05)),
    (METRIC, [(5.3, 4.13), (3.2, 4.57)], (4.75, 4.4)),
    (METRIC, [(3.85, 5.0), (4.35, 5.0)], (4.1, 5.16)),
    (CHECKPOINT, [(8.05, 3.82), (8.55, 3.82)], (8.3, 3.98)),
    (CHECKPOINT, [(8.55, 3.58), (8.05, 3.58)], (8.3, 3.38)),
    (CHECKPOINT, [(10.4, 4.13), (10.4, 4.57)], (10.62, 4.35)),
]
"""Color, the points of an arrow, and where its number stands; numbered in order within each color."""


def box(axes: Axes, name: str, middle: Point, purpose: str) -> None:
    corner = middle[0] - WIDTH / 2, middle[1] - HEIGHT / 2
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor="#f3f3f3", edgecolor="#555555"))
    axes.text(middle[0], middle[1] + 0.16, name, ha="center", va="center", fontsize=11, fontweight="bold")
    axes.text(middle[0], middle[1] - 0.18, purpose, ha="center", va="center", fontsize=8)


def main() -> None:
    figure, axes = plt.subplots(figsize=(11, 6.2), layout="constrained")
    axes.set(xlim=(0, 12.4), ylim=(0.1, 6.9))
    axes.axis("off")
    for name, (middle, purpose) in PACKAGES.items():
        box(axes, name, middle, purpose)
    numbers: dict[str, int] = {}
    for color, points, label in PATHS:
        numbers[color] = numbers.get(color, 0) + 1
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
        axes.annotate("", points[-1], points[0], arrowprops=style)
        axes.text(*label, str(numbers[color]), color=color, fontsize=10, fontweight="bold", ha="center", va="center")
    for x, (text, color) in zip(
        (2.0, 6.2, 10.4), (("a batch", BATCH), ("a metric", METRIC), ("a checkpoint", CHECKPOINT)), strict=True
    ):
        axes.text(x, 0.3, f"path of {text}", color=color, fontsize=11, fontweight="bold", ha="center")
    figure.savefig(Path(__file__).parent / "images/architecture.png", dpi=110)


if __name__ == "__main__":
    main()
