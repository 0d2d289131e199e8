"""Tables and picture of why-it-works.md, from `mtp-dist analyze`."""

from collections.abc import Iterable
from typing import Any

from generators.common import IMAGES, pyplot, read_json, table, with_origin

from mtp_dist.cli.analyze_tables import (
    CHOICE_COLUMNS,
    INFORMATION_COLUMNS,
    PROBE_COLUMNS,
    SHARE_COLUMNS,
    SOURCE_COLUMNS,
    choice_cells,
    distance_cells,
    information_cells,
    probe_cells,
    share_cells,
    source_cells,
)

SHOWN_HEADS = (1, 2, 4, 8)


def tables() -> dict[str, str]:
    choices, source = _read("choice-points"), _read("source")
    [model] = choices["models"]
    rows = model["rows"]
    return {
        "why-terms": with_origin(table(CHOICE_COLUMNS, (choice_cells(row, rows[0]) for row in rows)), choices),
        "why-shares": with_origin(table(SHARE_COLUMNS, map(share_cells, rows)), choices),
        "why-source": with_origin(_escaped(("nats", *source["decompositions"]), source_cells(source)), source),
        "why-distances": with_origin(_escaped(SOURCE_COLUMNS, map(distance_cells, source["distances"])), source),
        "why-information": "\n".join(information(name) for name in ("information-choices", "information-bytes")),
        "why-probe": probes(_read("probe")),
        "why-scaling": scaling(_read("paper-scaling")),
    }


def _escaped(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table whose cells contain the bar of conditional entropies."""
    header, *rows = ([cell.replace("|", "\\|") for cell in cells] for cells in (header, *rows))
    return table(header, rows)


def information(name: str) -> str:
    result = _read(name)
    [model] = result["models"]
    text = f"`{result['data']}`, {model['tokens']:,} held-out tokens, nats:\n"
    return f"{text}\n{with_origin(table(INFORMATION_COLUMNS, map(information_cells, model['rows'])), result)}"


def probes(result: dict[str, Any]) -> str:
    rows = [[f"n = {model['heads']}", *probe_cells(row)] for model in result["models"] for row in model["rows"]]
    return with_origin(table(PROBE_COLUMNS, sorted(rows, key=lambda row: row[1])), result)


def scaling(paper: dict[str, Any]) -> str:
    header = ["parameters", *(f"{task}, n = {n}" for task in ("MBPP", "HumanEval") for n in (1, 2, 4))]
    rows = [[row["size"], *(f"{value:.1f}" for value in (*row["mbpp"], *row["humaneval"]))] for row in paper["rows"]]
    return f"{paper['source']}:\n\n{table(header, rows)}"


def _read(name: str) -> Any:
    [result] = read_json(f"why/{name}.json")
    return result


def draw() -> None:
    """Draw loss and gradient by position, and the loss of each head by the offset of its target."""
    plt = pyplot()
    [model] = _read("choice-points")["models"]
    figure, (loss, gradient, offsets) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axes, name, label in (
        (loss, "nats", "loss of heads 1..n (nats)"),
        (gradient, "gradient", "norm of the gradient at z"),
    ):
        for color, n in enumerate(SHOWN_HEADS):
            axes.plot(model["profile"][name][n - 1], f"C{color}o-", markersize=3, label=f"n = {n}")
        axes.set(xlabel="tokens since the last choice", ylabel=label, xticks=range(0, 17, 2))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    loss.legend()
    values = [[float("nan") if value is None else value for value in head] for head in model["nats_by_offset"]]
    image = offsets.imshow(
        values, origin="lower", cmap="Blues", extent=(-0.5, len(values[0]) - 0.5, 0.5, len(values) + 0.5)
    )
    offsets.set(xlabel="target: tokens after the choice", ylabel="head k")
    figure.colorbar(image, label="loss (nats)")
    figure.savefig(IMAGES / "why-it-works.png", dpi=110)
