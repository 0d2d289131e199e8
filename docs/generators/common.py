"""What the generated parts of the docs share: committed data, tables, pyplot."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
DATA, IMAGES = DOCS / "data", DOCS / "images"


def read_json(pattern: str) -> list[Any]:
    """Return the content of the data files that match a pattern, by name."""
    return [json.loads(path.read_text()) for path in sorted(DATA.glob(pattern))]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_origin(shown: str, *results: dict[str, Any]) -> str:
    """Return a table and, below it, the machine, the time and the commit of each of its measurements.

    They are in "measured", by `mtp_dist.provenance`. Older results have "committed" instead, the commit that added the
    file and its date, because the commit that was measured was not recorded, and at most a "machine".
    """
    return f"{shown}\n{' '.join(dict.fromkeys(map(_origin, results)))}\n"


def _origin(result: dict[str, Any]) -> str:
    machine = result.get("measured") or result.get("machine", {})
    parts = [
        machine.get("processor"),
        *machine.get("gpus", ()),
        machine.get("device", "CPU").removeprefix("CPU"),
        f"{machine['cores']} cores" if "cores" in machine else None,
        f"PyTorch {machine['torch']}" if "torch" in machine else None,
    ]
    place = ", ".join(filter(None, parts)) or "Machine not recorded"
    if "measured" in result:
        return f"{place}; {machine['time']}, commit {machine['commit']}."
    return f"{place}; committed {result['committed']['time']} as {result['committed']['commit']}."


def pyplot() -> Any:
    """Return pyplot. It is imported here because `--check` does not need it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
