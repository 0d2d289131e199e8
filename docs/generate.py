"""Makes what the docs show from committed data: `python docs/generate.py` rewrites it, `--check` only compares.

configuration.md comes from the configuration's own docstrings, the parity table of parallelism.md from
data/parity.json, images/demo.png from data/demo-metrics.jsonl (drawn only without --check: pixels depend on fonts).
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from mtp_dist.config import Config, Section, SourceConfig

DOCS = Path(__file__).parent
TABLE = re.compile(r"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)".replace("{name}", "([a-z-]+)"), re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a value of a field may be, as a user writes it."""
    text = str(annotation)
    literals = [repr(value).strip("'") for part in (annotation, *get_args(annotation)) for value in get_args(part)]
    if "Literal" in text and all(isinstance(value, str) for value in literals):
        names = [name for name in literals if re.fullmatch(r"[a-z0-9]+", name)]
        return " / ".join(f"`{name}`" for name in names) + (
            " / list of integers" if "Tuple" in text or "tuple" in text else ""
        )
    if "SourceConfig" in text:
        return "list of sources"
    if "tuple" in text:
        return "list of numbers"
    if "bool" in text:
        return "true / false"
    if "dict" in text:
        return "mapping"
    bounds = " ".join(str(item) for item in metadata)
    kind = "integer" if "int" in text else "number" if "float" in text else "text"
    if "Gt(gt=0)" in text or "gt=0" in bounds:
        kind += " > 0"
    elif "ge=0" in text or "ge=0" in bounds:
        kind += " >= 0"
    return kind


def field_rows(section: type[Section]) -> Iterator[list[str]]:
    for key, field in section.model_fields.items():
        default = "**required**" if field.is_required() else "absent" if field.default is None else f"`{field.default}`"
        description = " ".join((field.description or "").split())
        yield [f"`{key}`", describe_type(field.annotation, field.metadata), default, description]


def configuration_page() -> str:
    header = ["key", "value", "default", "meaning"]
    parts = [
        "# Configuration\n",
        "A run is one YAML file, such as [configs/demo.yaml](../configs/demo.yaml), and any number of overrides on the "
        "command line:\n",
        "    deepspeed launchers/pretrain.py --config configs/demo.yaml train.steps=50 parallel.pipeline=1\n",
        "A wrong key or value ends with one sentence and exit status 2 before any rank does work. This page is made "
        "from the docstrings in [config/sections.py](../mtp_dist/config/sections.py) by `python docs/generate.py`.\n",
    ]
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            parts += [f"## {name}\n", table(header, field_rows(field.annotation))]
        else:
            parts += [f"## {name}\n", f"{field.description}\n"]
        if name == "data":
            parts += ["A source:\n", table(header, field_rows(SourceConfig))]
    return "\n".join(parts)


def parity_table(records: list[dict[str, Any]]) -> str:
    """One row a layout: the worst error over ZeRO stages, accumulation steps and numbers of heads."""
    rows = []
    for layout in dict.fromkeys(tuple(record["layout"]) for record in records):
        cells = []
        for precision, quantities in (
            ("fp32", ["losses", "gradient norm", "gradients", "loss curve"]),
            ("bf16", ["loss curve"]),
        ):
            runs = [r for r in records if tuple(r["layout"]) == layout and r["precision"] == precision]
            cells += [f"{max(run['errors'][quantity] for run in runs):.1e}" for quantity in quantities]
        tensor, pipeline, data, sequence = layout
        rows.append([f"{tensor} x {pipeline} x {data}", "yes" if sequence else "", *cells])
    header = ["tensor x pipeline x data", "sequence parallel", "losses", "gradient norm", "gradients", "20-step curve"]
    return table([*header, "20-step curve, bf16"], rows)


def with_tables(page: str, tables: dict[str, str]) -> str:
    return TABLE.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", page)


def pages() -> dict[Path, str]:
    """What every generated page must contain."""
    parallelism = DOCS / "parallelism.md"
    tables = {"parity": parity_table(json.loads((DOCS / "data/parity.json").read_text()))}
    return {
        DOCS / "configuration.md": configuration_page(),
        parallelism: with_tables(parallelism.read_text(), tables),
    }


def draw_demo() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (DOCS / "data/demo-metrics.jsonl").read_text().splitlines()]
    summary = json.loads((DOCS / "data/demo-summary.json").read_text())
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for k in range(1, len(summary["validation"]["heads"]) + 1):
        training = [(line["step"], line[f"loss/head_{k}"]) for line in lines if f"loss/head_{k}" in line]
        key = f"validation/loss/head_{k}"
        validation = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*training, strict=True), color=f"C{k - 1}", alpha=0.5)
        axes.plot(*zip(*validation, strict=True), "o-", color=f"C{k - 1}", label=f"head {k}: token t+{k}")
    entropy = summary["validation"]["unigram_entropy"]
    axes.axhline(entropy, color="black", linestyle=":", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(1.2, 4.2))
    axes.set_title("make demo: training (thin) and validation loss of each head")
    axes.legend(ncols=2)
    figure.savefig(DOCS / "images/demo.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a page differs from what it is made of")
    check = parser.parse_args().check
    stale = [path.name for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if check and stale:
        sys.exit(f"{', '.join(stale)}: run python docs/generate.py")
    if not check:
        for path, text in pages().items():
            path.write_text(text)
        draw_demo()


if __name__ == "__main__":
    main()
