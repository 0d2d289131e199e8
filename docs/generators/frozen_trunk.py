"""The table of what training heads on a frozen trunk costs: data/frozen-trunk.json."""

from typing import Any

from generators.common import read_json, table, with_origin

COLUMNS = ("heads", "trained parameters", "time", "FLOPs", "time / FLOPs", "memory between steps", "memory of a step")


def tables() -> dict[str, str]:
    [result] = read_json("frozen-trunk.json")
    return {"frozen-trunk": with_origin(table(COLUMNS, map(cells, result["rows"])), result)}


def cells(row: dict[str, Any]) -> list[str]:
    """Return a kind's costs relative to training everything."""
    keys = ("seconds", "flops_per_token", "resident_bytes", "peak_bytes_above")
    time, flops, resident, peak = (row[key]["frozen"] / row[key]["all"] for key in keys)
    ratios = [f"{time:.2f}", f"{flops:.2f}", f"{time / flops:.2f}", f"{resident:.2f}", f"{peak:.2f}"]
    return [row["heads"], f"{row['trained'] / row['parameters']:.0%}", *ratios]
