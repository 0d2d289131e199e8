"""Report of one or several runs: an HTML page that contains its pictures and needs no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from mtp_dist.errors import LaunchError
from mtp_dist.monitoring.report.figures import RATES, draw
from mtp_dist.monitoring.report.run_files import RunFiles, read_run

PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd }
img { max-width: 100%; display: block; margin: .5rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #eee; vertical-align: top }
pre { background: #f6f6f6; padding: .8rem; overflow: auto } .pairs { display: flex; flex-wrap: wrap; gap: 1rem }
.pairs img { width: calc(50% - .5rem) } .skip, .spike, .rollback, .stop { color: #a33 }
</style></head><body>
<h1>{{ title }}</h1>
<table>
<tr><th></th>{% for run in runs %}<th>{{ run.name }}</th>{% endfor %}</tr>
{% for name in facts[0] %}
<tr><td>{{ name }}</td>{% for run_facts in facts %}<td>{{ run_facts[name] }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<h2>Losses of the heads</h2>
{% for name, png in losses.items() %}
<img alt="{{ name }}" src="data:image/png;base64,{{ png }}">
{% endfor %}
{% if acceptance %}
<h2>Drafts that head 1 accepts</h2>
<p>Fraction of the forward passes of greedy decoding along the validation text in which head 1 accepts the drafts of all
distances up to this one. For <code>sequential</code> heads it is an upper estimate: here they read the text, when they
decode their own drafts.</p>
{% for name, png in acceptance.items() %}
<img alt="{{ name }}" src="data:image/png;base64,{{ png }}">
{% endfor %}
{% endif %}
<h2>Throughput, memory, gradient</h2>
<div class="pairs">
{% for name, png in rates.items() %}
<img alt="{{ name }}" src="data:image/png;base64,{{ png }}">
{% endfor %}
</div>
{% for run in runs %}
<h2>Events of {{ run.name }}</h2>
<table>
<tr><th>time (UTC)</th><th>step</th><th></th><th></th></tr>
{% for event in run.events %}
<tr class="{{ event.kind }}"><td>{{ event.time }}</td><td>{{ "{:,}".format(event.step) }}</td><td>{{ event.kind }}</td>
<td>{{ event.text }}</td></tr>
{% else %}
<tr><td>No events.</td></tr>
{% endfor %}
</table>
{% endfor %}
{% for run in runs %}
<h2>Configuration of {{ run.name }}</h2>
<pre>{{ configurations[loop.index0] }}</pre>
{% endfor %}
</body></html>
"""


def write_report(folders: Sequence[Path], target: Path) -> Path:
    """Write `index.html` and its pictures into the folder `target` and return the page's path.

    Raise UserError if a folder does not contain a run or the target cannot be written.
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
        raise LaunchError(f"cannot write --to = '{target}' ({error.filename}: {error.strerror})") from None
    return page


def html(runs: Sequence[RunFiles], pictures: Mapping[str, bytes]) -> str:
    """Return the page; pictures: PNG files by name."""
    encoded = {name: b64encode(picture).decode() for name, picture in pictures.items()}
    facts = [_facts(run) for run in runs]
    every_fact = dict.fromkeys((name for run_facts in facts for name in run_facts), "")
    template = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined).from_string(PAGE)
    return template.render(
        title=" and ".join(run.name for run in runs),
        runs=runs,
        facts=[every_fact | run_facts for run_facts in facts],
        losses={name: png for name, png in encoded.items() if name.endswith("-loss")},
        acceptance={name: png for name, png in encoded.items() if name.endswith("-acceptance")},
        rates={name: png for name, png in encoded.items() if name in RATES},
        configurations=[yaml.safe_dump(run.description.get("config", {}), sort_keys=False) for run in runs],
    )


def _facts(run: RunFiles) -> dict[str, str]:
    last = run.metrics[-1]
    facts = {"folder": str(run.folder), "last step": f"{last['step']:,}"}
    for prefix in ("loss", *(f"{prefix}/loss" for prefix in run.validation_prefixes())):
        values = [run.curve(scalar)[-1:] for scalar in run.scalars(f"{prefix}/head")]
        facts[f"last {prefix.replace('/', ' ')}"] = " ".join(f"{value[0][1]:.4f}" if value else "-" for value in values)
    for prefix in run.validation_prefixes():
        if expected := run.curve(f"{prefix}/expected_tokens_per_forward"):
            facts[f"last {prefix.replace('/', ' ')} tokens per forward pass"] = f"{expected[-1][1]:.2f}"
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
