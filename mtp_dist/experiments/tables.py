"""Tables of an experiment's result: our means next to the paper's figures, and the differences with their verdicts."""

from collections.abc import Mapping
from typing import Any

from mtp_dist.experiments.results import Result

Rows = list[list[str]]
"""Header and rows."""


def metric_rows(result: Result) -> Rows:
    """Return one row per cell: means with 95 % intervals, number of seeds, the paper's figure."""
    axes = list(result["cells"][0]["cell"])
    column = result["paper"]["column"] or result["paper"]["source"]
    header = [*axes, *result["metrics"], "seeds", f"paper: {column}"]
    rows = []
    for cell in result["cells"]:
        metrics = cell["metrics"]
        seeds = max((found["count"] for found in metrics.values()), default=0)
        paper = "" if cell["paper"] is None else str(cell["paper"])
        rows.append(
            [*cell["cell"].values(), *(_with_chance(metrics, name) for name in result["metrics"]), str(seeds), paper]
        )
    return [header, *rows]


def _with_chance(metrics: Mapping[str, Any], name: str) -> str:
    """Return a metric's mean and interval, and for an accuracy what guessing reaches if the evaluation measured it."""
    chance = metrics.get(name.replace("accuracy/", "chance/")) if name.startswith("accuracy/") else None
    return estimate(metrics.get(name)) + (f" (chance {chance['mean']:.2f})" if chance else "")


def comparison_rows(result: Result) -> Rows:
    """Return one row per arm and cell: the difference from the baseline, the paper's, and the verdict."""
    compare = result["compare"]
    header = [f"{compare['metric']} - that of {compare['baseline']}", "difference", "paper's effect", "verdict", "why"]
    rows = []
    for row in result["comparisons"]:
        effect = "" if row["effect"] is None else f"{row['effect']:+.3g}"
        cells = [
            ", ".join(row["cell"].values()),
            estimate(row["difference"], "+"),
            effect,
            row["verdict"],
            row["reason"],
        ]
        rows.append(cells)
    return [header, *rows]


def estimate(interval: Mapping[str, Any] | None, sign: str = "") -> str:
    """Return a mean and its interval, such as `0.912 ± 0.004`."""
    if interval is None:
        return ""
    mean, half_width = interval["mean"], interval["half_width"]
    return f"{mean:{sign}.3f}" + ("" if half_width is None else f" ± {half_width:.3f}")


def markdown_table(rows: Rows) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origin(result: Result) -> str:
    """Return the command, machine, time, commit and versions that a result was made with."""
    machine = result["machine"]
    place = ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    command = f"mtp-dist experiment {result['experiment']} --preset {result['preset']}"
    return f"{command}: {place}; {result['time']}; commit {result['commit'] or 'unknown'}; {versions}"


def markdown(result: Result, picture: str) -> str:
    """Return the result as Markdown. picture: the plot's path relative to the page."""
    missing = result["missing_runs"]
    parts = [
        f"{result['question']} Paper: {result['paper']['source']}.\n",
        markdown_table(metric_rows(result)),
        "Means over seeds with 95 % intervals (Student's t).\n",
        markdown_table(comparison_rows(result)),
        *[f"Paper's effect: {source}\n" for source in [result["compare"]["effect_source"]] if source],
        *[f"Without result: {'; '.join(missing)}.\n"] * bool(missing),
        f"![{result['title']}]({picture})\n",
        f"{origin(result)}\n",
    ]
    return "\n".join(parts)
