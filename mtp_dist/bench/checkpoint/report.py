"""The result for a terminal."""

from typing import Any

from rich.table import Table

NAMES = {
    "stall": "training waits",
    "save": "saved: gathered, written, synced, read back, hashed",
    "torch.save": "torch.save: gathered, written, synced",
    "load": "loaded into the engine",
    "torch.load": "torch.load into memory",
}


def table(result: dict[str, Any]) -> Table:
    """A row for each way."""
    layout = " x ".join(f"{axis} {degree}" for axis, degree in result["layout"].items())
    title = f"{result['megabytes']:,.0f} MB, {layout}, stall {result['stall_share']:.0%} of a save"
    rows = Table("", "seconds", "MB/s", title=title)
    for name, label in NAMES.items():
        seconds = result["seconds"][name]
        rows.add_row(label, f"{seconds:.2f}", f"{result['megabytes'] / seconds:,.0f}")
    return rows
