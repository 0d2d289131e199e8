"""The tables of `mtp-dist bench plan`."""

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


TIME_COLUMNS = ("pipeline", "layers", "heads", "forward ms", "backward ms", "error", "error by FLOPs")


def plan_time_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a stage: its parts, the time of each pass predicted / measured, and the error of both."""
    passes = zip(row["predicted"], row["measured"], strict=True)
    milliseconds = [f"{1000 * predicted:.1f} / {1000 * measured:.1f}" for predicted, measured in passes]
    parts = f"{row['case']}, stage {row['stage']}", str(row["trunk_layers"]), str(row["heads"])
    return [*parts, *milliseconds, f"{row['error']:+.1%}", f"{row['error_by_flops']:+.1%}"]


def bench_plan_tables(result: dict[str, Any]) -> list[Table]:
    """Return a table of the memory of each pipeline rank and one of the times of each stage, if they are measured."""
    tables = []
    if rows := result.get("memory"):
        worst = max(row["error"] for row in rows)
        title = f"MB predicted / measured; largest error of a large component {worst:.1%}"
        tables.append(Table(*PLAN_COLUMNS, title=title))
        for row in rows:
            tables[-1].add_row(*bench_plan_cells(row))
    if rows := result.get("times"):
        worst = max(abs(row["error"]) for row in rows)
        title = f"Processor time per micro-batch, predicted / measured; largest error {worst:.1%}"
        tables.append(Table(*TIME_COLUMNS, title=title))
        for row in rows:
            tables[-1].add_row(*plan_time_cells(row))
    return tables
