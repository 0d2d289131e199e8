"""One HTML page that needs nothing else: pictures are part of it, no network is used."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from mtp_dist.errors import ConfigError
from mtp_dist.monitoring.report.figures import draw
from mtp_dist.monitoring.report.run_files import RunFiles, read_run

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd }}
img {{ max-width: 100%; display: block; margin: .5rem 0 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #eee; vertical-align: top }}
pre {{ background: #f6f6f6; padding: .8rem; overflow: auto }} .of-two {{ display: flex; flex-wrap: wrap; gap: 1rem }}
.of-two img {{ width: calc(50% - .5rem) }} .skip, .spike, .rollback, .stop {{ color: #a33 }}
</style></head><body>
{body}
</body></html>
"""


def write_report(folders: Sequence[Path], target: Path) -> Path:
    """Write `index.html` and its pictures into the folder `target`; returns the page's path.

    Raises ConfigError where a folder has no run or the target cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    pictures = draw(runs)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (target / f"{name}.png").write_bytes(picture)
        page = target / "index.html"
        page.write_text(html(runs, pictures), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write --to = '{target}' ({error.filename}: {error.strerror})") from None
    return page


def html(runs: Sequence[RunFiles], pictures: Mapping[str, bytes]) -> str:
    title = " and ".join(run.name for run in runs)
    losses = [name for name in pictures if name.endswith("-loss")]
    parts = [f"<h1>{escape(title)}</h1>", _overview(runs), "<h2>Losses of the heads</h2>"]
    parts += [_image(name, pictures[name]) for name in losses]
    parts += ["<h2>Throughput, memory, gradient</h2>", "<div class='of-two'>"]
    parts += [_image(name, picture) for name, picture in pictures.items() if name not in losses]
    parts.append("</div>")
    for run in runs:
        parts += [f"<h2>Events of {escape(run.name)}</h2>", _events(run)]
    for run in runs:
        config = yaml.safe_dump(run.description.get("config", {}), sort_keys=False)
        parts += [f"<h2>Configuration of {escape(run.name)}</h2>", f"<pre>{escape(config)}</pre>"]
    return PAGE.format(title=escape(title), body="\n".join(parts))


def _overview(runs: Sequence[RunFiles]) -> str:
    """A row for each fact, a column for each run."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for of_run in facts for name in of_run)
    rows = [["", *(run.name for run in runs)]]
    rows += [[name, *(of_run.get(name, "") for of_run in facts)] for name in names]
    return _table(rows)


def _facts(run: RunFiles) -> dict[str, str]:
    last = run.metrics[-1]
    facts = {"folder": str(run.folder), "last step": f"{last['step']:,}"}
    for prefix in ("loss", *(f"{prefix}/loss" for prefix in run.validation_prefixes())):
        values = [run.curve(scalar)[-1:] for scalar in run.scalars(prefix)]
        facts[f"last {prefix.replace('/', ' ')}"] = " ".join(f"{value[0][1]:.4f}" if value else "-" for value in values)
    if rates := [rate for _, rate in run.curve("throughput/tokens_per_second")]:
        facts["tokens per second, mean"] = f"{sum(rates) / len(rates):,.0f}"
    if memory := [peak for _, peak in run.curve("memory/peak_bytes")]:
        facts["peak memory of a rank"] = f"{max(memory) / 1e9:,.2f} GB"
    facts["restarts"] = str(len(run.restarts))
    for fact, kind in {"skipped steps": "skip", "spikes": "spike", "rollbacks": "rollback"}.items():
        facts[fact] = str(sum(event["kind"] == kind for event in run.events))
    for name in ("device", "layout", "parameters", "versions"):
        if name in run.description:
            facts[name] = _text(run.description[name])
    return facts


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(
        f"{name} {number:,}" if isinstance(number, int) else f"{name} {number}"
        for name, number in value.items()
        if number is not None
    )


def _events(run: RunFiles) -> str:
    if not run.events:
        return "<p>None were written.</p>"
    rows = [["time (UTC)", "step", "", ""]]
    rows += [[e["time"], f"{e['step']:,}", e["kind"], e["text"]] for e in run.events]
    return _table(rows, (event["kind"] for event in run.events))


def _table(rows: Sequence[Sequence[str]], kinds: Iterable[str] = ()) -> str:
    """The first row is the header; kinds: the classes of the others."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    classes = [*kinds] or [""] * (len(rows) - 1)
    lines = [
        f"<tr class='{escape(kind)}'>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row, kind in zip(rows[1:], classes, strict=True)
    ]
    return f"<table><tr>{header}</tr>\n" + "\n".join(lines) + "</table>"


def _image(name: str, picture: bytes) -> str:
    return f"<img alt='{escape(name)}' src='data:image/png;base64,{b64encode(picture).decode()}'>"
