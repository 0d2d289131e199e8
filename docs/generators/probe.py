"""Tables and picture of the layers in adaptation.md, from `mtp-dist analyze probe`."""

from pathlib import Path
from typing import Any

from generators.common import IMAGES, pyplot, read_json, table, with_origin

from mtp_dist.cli.analyze_tables import layer_columns, layer_rows


def tables() -> dict[str, str]:
    shown = [
        f"{_name(model)}, {model['positions']:,} positions of `{result['data']}`:\n\n"
        + with_origin(table(layer_columns(model), layer_rows(model)), result)
        for result, model in _models()
    ]
    return {"probe-layers": "\n".join(shown)}


def _models() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the probed models, each with the result that it is a part of."""
    return [(result, model) for result in read_json("why/probe*.json") for model in result["models"]]


def _name(model: dict[str, Any]) -> str:
    return f"`{Path(model['model']).name}`, n = {model['heads']}"


def draw() -> None:
    """Draw accuracy and cross-entropy by layer, a column for each model and a line for each distance."""
    plt = pyplot()
    models = [model for _, model in _models()]
    figure, grid = plt.subplots(2, len(models), figsize=(4.5 * len(models), 6.5), squeeze=False, layout="constrained")
    for column, model in enumerate(models):
        for axes, quality in zip(grid[:, column], ("accuracy", "cross_entropy"), strict=True):
            for color, row in enumerate(model["rows"]):
                values = [score[quality] for score in row["layers"]]
                axes.plot(values, f"C{color}o-", markersize=3, label=f"distance {row['distance']}")
                axes.axhline(row["unigram"][quality], color=f"C{color}", linestyle=":", linewidth=1)
            names = [score["layer"].removeprefix("layer ") for score in model["rows"][0]["layers"]]
            step = max(1, len(names) // 8)
            shown = sorted({0, *range(step, len(names) - 1, step), len(names) - 1})
            axes.set_xticks(shown, [names[index] for index in shown], rotation=30, ha="right")
            axes.grid(alpha=0.3)
        grid[0, column].set_title(_name(model).replace("`", ""))
    grid[0, 0].set_ylabel("accuracy of the probe")
    grid[1, 0].set_ylabel("cross-entropy (nats)")
    grid[0, 0].legend()
    figure.savefig(IMAGES / "probe.png", dpi=110)
