"""Tables of `mtp-dist analyze`; docs/generators has the same cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table

CHOICE_COLUMNS = (
    "n",
    "terms per choice",
    "paper: n(n+1)/2",
    "loss, relative to n = 1",
    "gradient, relative",
    "terms per inconsequential token",
    "paper: n",
    "loss, relative",
    "gradient, relative",
)
SHARE_COLUMNS = (
    "n",
    "loss about choices",
    "after them",
    "inconsequential",
    "gradient at choice points",
    "before determined tokens",
    "before inconsequential ones",
    "norm of the sum / sum of the norms, at choice points",
)
INFORMATION_COLUMNS = ("head", "distance", "loss", "head 1, same tokens", "information", "of the loss of heads 1..k")
PROBE_COLUMNS = (
    "model",
    "distance",
    "accuracy",
    "shuffled",
    "unigram",
    "cross-entropy",
    "shuffled",
    "unigram",
    "difference to the first model",
    "the model's own head",
)
SOURCE_LABELS = {
    "x": "H(X)",
    "y": "H(Y)",
    "x_given_y": "H(X|Y)",
    "y_given_x": "H(Y|X)",
    "information": "I(X; Y)",
    "two_heads": "H(X) + H(Y)",
    "decomposed": "H(X|Y) + 2 I(X; Y) + H(Y|X)",
}
SOURCE_COLUMNS = ("distance k", "H(x_t+k | x_t)", "I(x_t+1..t+k-1; x_t+k | x_t)")


def choice_cells(row: dict[str, Any], single: dict[str, Any]) -> list[str]:
    """Return terms, loss and gradient of n heads; loss and gradient relative to those of one head."""
    n = row["heads"]
    cells = [str(n)]
    for part, formula in (("choice", n * (n + 1) // 2), ("inconsequential", n)):
        ratios = [_ratio(row[part][name], single[part][name]) for name in ("nats", "gradient")]
        cells += [f"{row[part]['terms']:.2f}", str(formula), *ratios]
    return cells


def share_cells(row: dict[str, Any]) -> list[str]:
    """Return the shares of the loss and of the gradient, and how parallel the heads' gradients are."""
    loss, gradient = row["loss_share"], row["gradient_share"]
    shares = [loss[name] for name in ("choice", "known", "inconsequential")]
    shares += [gradient[name] for name in ("choice", "determined", "inconsequential")]
    return [str(row["heads"]), *(f"{share:.1%}" for share in shares), f"{row['alignment']['choice']:.2f}"]


def information_cells(row: dict[str, Any]) -> list[str]:
    losses = [f"{row[name]:.3f}" for name in ("loss", "next_token_loss", "information")]
    losses[-1] += _spread(row["information_interval"], ".3f")
    return [str(row["head"]), str(row["distance"]), *losses, f"{row['information_share']:.1%}"]


def probe_cells(row: dict[str, Any]) -> list[str]:
    found = [row[name] for name in ("probe", "shuffled", "unigram")]
    accuracies, entropies = (
        [f"{one['accuracy']:.1%}" for one in found],
        [f"{one['cross_entropy']:.3f}" for one in found],
    )
    accuracies[0] += _spread(found[0]["accuracy_interval"], ".1%")
    difference = row.get("difference")
    compared = f"{difference['cross_entropy']:+.3f}{_spread(difference['interval'], '.3f')}" if difference else ""
    own = "" if row["head"] is None else f"{row['head']:.3f}"
    return [str(row["distance"]), *accuracies, *entropies, compared, own]


def source_cells(source: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the entropies of the decompositions, without and with a context."""
    for name, label in SOURCE_LABELS.items():
        yield [label, *(f"{values[name]:.12f}" for values in source["decompositions"].values())]


def distance_cells(row: dict[str, Any]) -> list[str]:
    return [str(row["distance"]), f"{row['entropy']:.12f}", f"{row['information']:.12f}"]


def choice_point_tables(result: dict[str, Any]) -> Iterator[Table]:
    rows = result["rows"]
    title = f"{result['model']}: {result['choices']:,} choices, {result['inconsequential']:,} inconsequential tokens"
    yield _table(CHOICE_COLUMNS, [choice_cells(row, rows[0]) for row in rows], title)
    yield _table(SHARE_COLUMNS, [share_cells(row) for row in rows], "Shares")


def information_table(result: dict[str, Any]) -> Table:
    title = f"{result['model']}: {result['tokens']:,} tokens, nats"
    return _table(INFORMATION_COLUMNS, [information_cells(row) for row in result["rows"]], title)


def source_tables(source: dict[str, Any]) -> Iterator[Table]:
    """Yield the two sides of the decomposition, and the information by context and by distance."""
    title = "X: next token, Y: the one after it; nats"
    yield _table(("", *source["decompositions"]), source_cells(source), title)
    after = [(token, f"{value:.12f}") for token, value in source["information_after"].items()]
    yield _table(("token before", "I(X; Y)"), after, "Information by the token before, nats")
    yield _table(SOURCE_COLUMNS, map(distance_cells, source["distances"]), "Perfect heads, nats")


def probe_table(results: Sequence[dict[str, Any]]) -> Table:
    rows = [[result["model"], *probe_cells(row)] for result in results for row in result["rows"]]
    return _table(PROBE_COLUMNS, rows, "Probes of the trunk's output: accuracy, and cross-entropy in nats")


def layer_table(result: dict[str, Any]) -> Table:
    title = f"{result['model']}: probes of each layer, accuracy and cross-entropy in nats by distance"
    return _table(layer_columns(result), layer_rows(result), title)


def layer_columns(result: dict[str, Any]) -> list[str]:
    columns = [(f"accuracy at {row['distance']}", "cross-entropy") for row in result["rows"]]
    return ["states", *(column for pair in columns for column in pair)]


def layer_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each layer, and those of the tokens' frequencies alone."""
    by_distance = [[*row["layers"], {"layer": "chance (unigram)", **row["unigram"]}] for row in result["rows"]]
    for scores in zip(*by_distance, strict=True):
        cells = [(_accuracy(one), f"{one['cross_entropy']:.3f}") for one in scores]
        yield [scores[0]["layer"], *(cell for pair in cells for cell in pair)]


def _accuracy(score: dict[str, Any]) -> str:
    return f"{score['accuracy']:.1%}{_spread(score['accuracy_interval'], '.1%')}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> Table:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _spread(half_width: float | None, form: str) -> str:
    return "" if half_width is None else f" ± {half_width:{form}}"


def _ratio(value: float, single: float) -> str:
    return f"{value / single:.2f}" if single else "-"
