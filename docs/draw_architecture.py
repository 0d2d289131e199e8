"""The picture of docs/architecture.md: `python docs/draw_architecture.py` draws it again."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

Point = tuple[float, float]

PACKAGES: dict[str, tuple[Point, str]] = {
    "cli": ((1.6, 9.1), "commands"),
    "experiments, bench": ((4.75, 9.1), "grids of runs, benchmarks"),
    "pretrain.py": ((7.9, 9.1), "the training program"),
    "run.py": ((11.2, 9.1), "one run"),
    "evaluation": ((4.75, 8.0), "lm-eval, code, synthetic tasks"),
    "analysis": ((7.9, 8.0), "choice points, information, probes"),
    "verify": ((4.75, 6.9), "selfcheck, preflight, start-up checks"),
    "inference": ((7.9, 6.9), "generation with the heads"),
    "training": ((7.9, 5.8), "the loop, rollback, stop signals"),
    "convert": ((11.2, 5.8), "Hugging Face export and import"),
    "monitoring": ((4.75, 4.7), "scalars, writers, events, report"),
    "checkpoint": ((11.2, 4.7), "format, reader, save, restore"),
    "data": ((4.75, 3.6), "sources, samples, loader"),
    "engine": ((7.9, 3.6), "DeepSpeed, heads with loss"),
    "model": ((4.75, 2.5), "trunk, heads, reference"),
    "loss": ((7.9, 2.5), "the heads' loss"),
    "planner": ((11.2, 2.5), "FLOPs, bytes, partition"),
    "distributed": ((1.6, 2.5), "devices, process groups"),
    "config": ((1.6, 1.4), "every key"),
    "metrics.py": ((4.75, 1.4), "records of a step"),
    "fs.py, provenance.py, ...": ((7.9, 1.4), "files, machine, versions"),
    "errors.py": ((11.2, 1.4), "below all others"),
}
"""Middle and purpose of each box: a row is a layer, except that the top row is four and errors.py one of its own."""
WIDTH, HEIGHT = 2.8, 0.7
BATCH, METRIC, CHECKPOINT = "#1f77b4", "#d62728", "#2ca02c"
PATHS: list[tuple[str, list[Point], Point]] = [
    (BATCH, [(5.9, 3.95), (7.0, 5.45)], (6.42, 4.35)),
    (BATCH, [(8.2, 5.45), (8.2, 3.95)], (8.38, 4.7)),
    (BATCH, [(6.5, 3.4), (5.7, 2.85)], (6.32, 3.02)),
    (BATCH, [(8.2, 3.25), (8.2, 2.85)], (8.38, 3.05)),
    (METRIC, [(7.6, 2.85), (7.6, 3.25)], (7.42, 3.05)),
    (METRIC, [(7.6, 3.95), (7.6, 5.45)], (7.42, 4.7)),
    (METRIC, [(6.5, 5.6), (5.7, 5.05)], (5.9, 5.4)),
    (CHECKPOINT, [(9.3, 3.75), (9.9, 4.35)], (9.4, 4.1)),
    (CHECKPOINT, [(10.2, 4.35), (9.3, 3.45)], (10.0, 3.9)),
    (CHECKPOINT, [(9.9, 5.05), (9.2, 6.55)], (9.42, 5.8)),
    (CHECKPOINT, [(10.9, 5.05), (10.9, 5.45)], (10.72, 5.25)),
    (CHECKPOINT, [(11.5, 5.45), (11.5, 5.05)], (11.68, 5.25)),
]
"""Color, the points of an arrow, and where its number stands; numbered in order within each color."""


def box(axes: Axes, name: str, middle: Point, purpose: str) -> None:
    corner = middle[0] - WIDTH / 2, middle[1] - HEIGHT / 2
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor="#f3f3f3", edgecolor="#555555"))
    axes.text(middle[0], middle[1] + 0.13, name, ha="center", va="center", fontsize=11, fontweight="bold")
    axes.text(middle[0], middle[1] - 0.16, purpose, ha="center", va="center", fontsize=8)


def main() -> None:
    figure, axes = plt.subplots(figsize=(11, 8.1), layout="constrained")
    axes.set(xlim=(0, 12.8), ylim=(0.5, 9.6))
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
        (2.0, 6.4, 10.8), (("a batch", BATCH), ("a metric", METRIC), ("a checkpoint", CHECKPOINT)), strict=True
    ):
        axes.text(x, 0.7, f"path of {text}", color=color, fontsize=11, fontweight="bold", ha="center")
    figure.savefig(Path(__file__).parent / "images/architecture.png", dpi=110)


if __name__ == "__main__":
    main()
