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


def pyplot() -> Any:
    """Return pyplot. It is imported here because `--check` does not need it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
