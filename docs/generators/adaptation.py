"""Tables and picture of adaptation.md, from `mtp-dist analyze marginalize`."""

from typing import Any

from generators.common import IMAGES, pyplot, read_json, table, with_origin

from mtp_dist.cli.analyze_marginalize import COLUMNS, marginal_cells

COST_COLUMNS = ("tokens of a window", "continuations", "tokens read per position", "seconds per position")


def tables() -> dict[str, str]:
    costs = read_json("adaptation/cost-*.json")
    return {
        "adaptation-marginals": _marginals("marginalization"),
        "adaptation-heads": _marginals("heads-only"),
        "adaptation-cost": with_origin(table(COST_COLUMNS, map(_cost_cells, sorted(costs, key=_size))), *costs),
    }


def _marginals(name: str) -> str:
    result = _read(name)
    return with_origin(table(COLUMNS, map(marginal_cells, result["rows"])), result)


def _size(result: dict[str, Any]) -> tuple[int, int]:
    return result["window_length"], result["beam"]


def _cost_cells(result: dict[str, Any]) -> list[str]:
    """Return the cells of a measurement of distance 2: the text once, and per position the rollout and the branches."""
    positions = result["positions"]
    tokens = result["windows"] * result["window_length"] / positions + 1 + result["beam"]
    return [*map(str, _size(result)), f"{tokens:.0f}", f"{result['seconds'] / positions:.2f}"]


def _read(name: str) -> Any:
    [result] = read_json(f"adaptation/{name}.json")
    return result


def draw() -> None:
    """Draw accuracy and cross-entropy by the number of continuations."""
    plt = pyplot()
    rows = _read("marginalization")["rows"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, key in zip(panels, ("top5", "cross_entropy"), strict=True):
        for color, distance in enumerate(sorted({row["distance"] for row in rows} - {1})):
            found = [row for row in rows if row["distance"] == distance]
            sums = [row for row in found if row["prediction"] == "marginal"]
            numbers = [row["k"] for row in sums]
            axes.plot(numbers, [row[key] for row in sums], f"C{color}o-", label=f"distance {distance}, sum over k")
            for name, style in (("true prefix", "--"), ("greedy rollout", ":")):
                [row] = [row for row in found if row["prediction"] == name]
                axes.axhline(row[key], color=f"C{color}", linestyle=style, label=f"distance {distance}, {name}")
            if key == "cross_entropy":
                bounds = ([row[name] for row in sums] for name in ("lower", "upper"))
                axes.fill_between(numbers, *bounds, color=f"C{color}", alpha=0.12)
        axes.set(xscale="log", xlabel="continuations k")
    panels[0].set(ylabel="top-5 accuracy")
    panels[1].set(ylabel="cross-entropy (nats)")
    panels[1].legend(fontsize=7)
    figure.savefig(IMAGES / "adaptation-marginals.png", dpi=110)
