"""`mtp-dist analyze marginalize`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mtp_dist.cli.options import AsJson, model_folder
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.cli.tables import show_result
from mtp_dist.errors import ConfigError, exits_with_user_errors

COLUMNS = ("distance", "prediction", "kept mass", "top-1", "top-5", "cross-entropy", "full sum, at least", "at most")
SPEED_PERIOD_S = 600
"""Seconds over which the speed is averaged; a group of positions of a large model takes minutes."""


@exits_with_user_errors
def marginalize(
    model: Annotated[
        str, typer.Option(help="Folder of a causal language model of Hugging Face, a checkpoint, an export or a run.")
    ],
    data: Annotated[
        str,
        typer.Option(help="A text file, python-stdlib, or a synthetic task, of which held-out documents are read."),
    ] = "python-stdlib",
    distance: Annotated[
        str,
        typer.Option(metavar="D | D..D", help="Distances of the tokens to predict, from 2 on; 1 is the next token."),
    ] = "2..4",
    top_k: Annotated[
        str, typer.Option(metavar="K,...", help="Numbers of most probable continuations to sum over.")
    ] = "1,5,10,50,100",
    tokens: Annotated[int, typer.Option(min=1, help="Approximate number of positions to predict from.")] = 512,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a window of the text; by default those of the training, or 256."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="File of results by window, from which a repetition continues.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model of the next token predicts further ones, by summing over the tokens in between.

    Next to it: the same model given the true tokens in between, and given its own most probable ones.
    """
    distances, numbers = _distances(distance), _numbers(top_k)
    from mtp_dist.analysis.causal_model import CausalModel
    from mtp_dist.analysis.marginal_windows import (
        MarginalizationOptions,
        cut_windows,
        measure_marginals,
        windows_needed,
    )
    from mtp_dist.analysis.text import read_tokens
    from mtp_dist.analysis.window_records import WindowRecords
    from mtp_dist.provenance import provenance

    options = MarginalizationOptions(distances, numbers)
    with progress_bar(SPEED_PERIOD_S) as bar:
        opened = CausalModel.open(model_folder(model), sequence_length, updates(bar, "verifying"))
        settings = {
            "model": opened.fingerprint(),
            "sequence_length": opened.sequence_length,
            "distance": list(distances),
            "top_k": list(numbers),
        }
        records = WindowRecords(Path(output).expanduser() if output else None, settings)
        count = windows_needed(opened, options, tokens)
        text = read_tokens(data, opened, count * opened.sequence_length + 1)
        windows = cut_windows(opened, text, options, count)
        measured = measure_marginals(opened, windows, options, records, updates(bar, opened.name))
    result = {"measured": provenance(), "data": data, **measured}
    show_result(result, as_json, marginalization_table(result))


def _distances(text: str) -> tuple[int, ...]:
    """Parse `D` or `D..D`. Raise ConfigError unless the first is at least 2 and the second no smaller."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 2 <= first <= last:
        raise ConfigError(
            f"--distance = '{text}' is not a distance from 2 on, or a range of them: give one such as 2 or 2..4"
        )
    return tuple(range(first, last + 1))


def _numbers(text: str) -> tuple[int, ...]:
    """Parse numbers separated by commas. Raise ConfigError unless all are positive."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(f"--top-k = '{text}' is not a list of positive integers: give one such as 1,5,10,50,100")
    return tuple(sorted({int(word) for word in words}))


def marginalization_table(result: dict[str, Any]) -> Table:
    title = (
        f"{result['model']}: {result['positions']:,} positions in {result['windows']} windows of "
        f"{result['window_length']} tokens, nats, ± 95%"
    )
    table = Table(*COLUMNS, title=title)
    for row in result["rows"]:
        table.add_row(*marginal_cells(row))
    return table


def marginal_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one distance and prediction. The bounds are those of a sum over all continuations."""
    is_sum = row["prediction"] == "marginal"
    name = f"sum over {row['k']}" if is_sum else row["prediction"]
    if not row["positions"]:
        return [str(row["distance"]), name, *["-"] * (len(COLUMNS) - 2)]
    values = [
        _with_interval(row, key, form) for key, form in (("top1", ".1%"), ("top5", ".1%"), ("cross_entropy", ".3f"))
    ]
    bounds = [f"{row[key]:.3f}" if is_sum else "" for key in ("lower", "upper")]
    mass = "" if row["k"] is None else f"{row['kept_mass']:.1%}"
    return [str(row["distance"]), name, mass, *values, *bounds]


def _with_interval(row: dict[str, Any], key: str, form: str) -> str:
    half_width = row[f"{key}_interval"]
    return f"{row[key]:{form}}" + ("" if half_width is None else f" ± {half_width:{form}}")
