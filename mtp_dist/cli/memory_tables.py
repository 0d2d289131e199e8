"""The table of `mtp-dist bench plan`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

PLAN_COMPONENTS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "accumulators": "fp32 sums",
    "optimizer": "optimizer",
    "communication": "buffers",
    "activations": "activations",
    "workspace": "pass, heads' loss",
    "update": "update",
    "total": "peak",
}
"""Short names of the components of memory, by their keys in `mtp-dist bench plan --json`."""


def bench_plan_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a pipeline rank: each component predicted / measured in MB, and the process's memory."""
    pairs = ((row["predicted"][name], row["measured"][name]) for name in PLAN_COMPONENTS)
    rank = f", rank {row['rank']}" if row["ranks"] > 1 else ""
    cells = ["" if not (predicted or measured) else _megabytes(predicted, measured) for predicted, measured in pairs]
    return [f"{row['case']}{rank}", *cells, f"{row['error']:.1%}", f"{row['resident'] / 1e6:,.0f}"]


def _megabytes(*sizes: int) -> str:
    return " / ".join(f"{size / 1e6:,.2f}" if size < 1e8 else f"{size / 1e6:,.0f}" for size in sizes)


PLAN_COLUMNS = ("configuration", *PLAN_COMPONENTS.values(), "largest error", "process")


def bench_plan_table(result: dict[str, Any]) -> Table:
    """Return a table with one row per pipeline rank."""
    worst = max(row["error"] for row in result["rows"])
    title = f"MB predicted / measured; largest error of a large component {worst:.1%}"
    table = Table(*PLAN_COLUMNS, title=title)
    for row in result["rows"]:
        table.add_row(*bench_plan_cells(row))
    return table
