"""The list of experiments, and the tables and plots of those that have been run: data/experiments/NAME-PRESET.json."""

from typing import Any

from generators.common import IMAGES, read_json, table

from mtp_dist.experiments.listing import listing
from mtp_dist.experiments.tables import markdown, markdown_table, metric_rows, origin

PRESET_ORDER = ("small", "gpu", "paper")


def tables() -> dict[str, str]:
    return {name: cells(name) for name in ("adaptation", "condition")} | {
        "experiments": experiments(),
        "experiment-results": sections(),
    }


def cells(name: str) -> str:
    """Return the means of an experiment's cells, for the page of what it compares."""
    [result] = (result for result in results() if result["experiment"] == name)
    return f"{markdown_table(metric_rows(result))}\n{origin(result)}\n"


def experiments() -> str:
    rows = []
    for row in listing():
        counts = [str(row["runs"].get(preset, "")) for preset in PRESET_ORDER]
        rows.append([f"[`{row['name']}`](../experiments/{row['name']}.yaml)", row["question"], row["paper"], *counts])
    return table(["experiment", "question", "paper", *(f"runs, `{preset}`" for preset in PRESET_ORDER)], rows)


def results() -> list[dict[str, Any]]:
    """Return the results, by experiment and then by preset."""
    found = read_json("experiments/*.json")
    return sorted(found, key=lambda result: (result["experiment"], PRESET_ORDER.index(result["preset"])))


def picture(result: dict[str, Any]) -> str:
    return f"experiment-{result['experiment']}-{result['preset']}.png"


def sections() -> str:
    found = [
        f"### {result['title']} (`{result['preset']}`)\n\n{markdown(result, f'images/{picture(result)}')}"
        for result in results()
    ]
    return "\n".join(found) if found else "No experiment has been run yet.\n"


def draw() -> None:
    from mtp_dist.experiments.plot import draw as draw_result

    for result in results():
        draw_result(result, IMAGES / picture(result))
