"""The result for a terminal."""

from typing import Any

from rich.table import Table


def table(result: dict[str, Any]) -> Table:
    """A row for each number of heads and mode; empty where memory did not suffice."""
    settings, machine = result["settings"], result["machine"]
    title = (
        f"{settings['tokens']} tokens, hidden size {settings['hidden']}, vocabulary {settings['vocab']}, "
        f"{settings['dtype']}, tensor parallel {settings['tp']}, on {machine['device']}, "
        f"{machine['threads_per_rank']} threads a rank"
    )
    columns = ["heads", "mode", "seconds", "x naive", "peak MiB", "collectives", "their MiB", "gradient error"]
    shown = Table(*columns, title=title)
    for row in result["rows"]:
        shown.add_row(str(row["heads"]), row["mode"], *_cells(row))
    return shown


def _cells(row: dict[str, Any]) -> list[str]:

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    if row["peak_bytes"] is None:
        return ["out of memory", "", "", "", "", ""]
    return [
        cell(row["seconds"], ".3f"),
        cell(row["seconds_relative_to_naive"], ".2f"),
        cell(row["peak_bytes"] / 2**20, ",.1f"),
        str(row["collectives"]),
        cell(row["collective_bytes"] / 2**20, ",.1f"),
        cell(row["gradient_error"], ".1e"),
    ]
