"""Generates parts of the docs from code and committed data: `python docs/generate.py` writes, `--check` compares.

configuration.md comes from the configuration's JSON schema, the tables of benchmarks.md and decoding.md from
data/*.json. Pictures come from data too, but only without --check, because pixels depend on fonts.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mtp_dist.cli.tables import BENCH_CHECKPOINT_LABELS
from mtp_dist.config import Config
from mtp_dist.config.base import MAX_INTEGER

DOCS = Path(__file__).parent
NAMES_OF_TYPES = {"boolean": "true / false", "string": "text", "object": "mapping"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
HEAD_LOSS_IMAGES = {"cpu": "head-loss.png", "cuda": "head-loss-gpu.png"}
TABLE = re.compile(r"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)".replace("{name}", "([a-z-]+)"), re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


SCHEMA = Config.model_json_schema()
CLASSES = SCHEMA["$defs"]


def describe_type(schema: dict[str, Any]) -> str:
    """Return the values that a JSON schema allows, as a user writes them."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "source" if name == "SourceConfig" else "keys below"
    if "anyOf" in schema:
        return " / ".join(describe_type(kind) for kind in schema["anyOf"] if kind.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " / ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    if "prefixItems" in schema:
        return f"[{', '.join(map(describe_type, schema['prefixItems']))}]"
    if schema["type"] == "array":
        items = describe_type(schema["items"])
        return "list of sources" if items == "source" else f"list of {items}"
    bounds = [
        f"{sign} {schema[name]:,}" for name, sign in BOUNDS.items() if schema.get(name, MAX_INTEGER) < MAX_INTEGER
    ]
    return " ".join([NAMES_OF_TYPES.get(schema["type"], schema["type"]), *[", ".join(bounds)] * bool(bounds)])


def field_rows(section: dict[str, Any]) -> Iterator[list[str]]:
    for key, schema in section["properties"].items():
        default = schema.get("default")
        shown = default if isinstance(default, str) else json.dumps(default)
        default = f"`{shown}`" if "default" in schema else "**required**"
        yield [f"`{key}`", describe_type(schema), default, " ".join(schema["description"].split())]


def configuration_page() -> str:
    header = ["key", "value", "default", "meaning"]
    parts = [
        "# Configuration\n",
        "Look up every key. A run is one YAML file, such as [configs/demo.yaml](../configs/demo.yaml), and any number "
        "of overrides on the command line:\n",
        "    mtp-dist launch --config configs/demo.yaml train.steps=50 parallel.pipeline=1\n",
        "An invalid key or value, such as `train.step=50`, ends the program with one message and exit status 2 before "
        "any rank does work:\n",
        "    error: train.step is not a known key: did you mean train.steps?\n",
        "This page is generated from the JSON schema of [config/](../mtp_dist/config) by `python docs/generate.py`.\n",
    ]
    for name, schema in SCHEMA["properties"].items():
        if "$ref" in schema:
            parts += [f"## {name}\n", table(header, field_rows(CLASSES[schema["$ref"].rpartition("/")[2]]))]
        else:
            parts += [f"## {name}\n", f"{schema['description']}\n"]
        if name == "model":
            rows = field_rows(CLASSES["RopeScalingConfig"])
            parts += ["`rope_scaling`, by the names of Hugging Face:\n", table(header, rows)]
        if name == "data":
            parts += ["A source:\n", table(header, field_rows(CLASSES["SourceConfig"]))]
    return "\n".join(parts)


def parity_table(records: list[dict[str, Any]]) -> str:
    """Return one row per layout: the worst error over ZeRO stages, accumulation steps and numbers of heads."""
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


def head_loss_section(result: dict[str, Any]) -> str:
    """Return the description, table and picture of a measurement."""
    machine, settings = result["machine"], result["settings"]
    sizes = " ".join(f"--{name} {settings[name]}" for name in ("tokens", "hidden", "vocab", "tp", "dtype", "device"))
    heads, modes = (",".join(map(str, settings[name])) for name in ("heads", "modes"))
    number = machine["threads_per_rank"]
    threads = f", {number} thread{'s' * (number > 1)} per rank" if settings["device"] == "cpu" else ""
    header = ["n", "mode", "seconds", "x naive", "of the matmuls' rate", "peak MiB", "gradient error"]
    if settings["tp"] > 1:
        header += ["collectives", "collective MiB"]
    return "\n".join(
        [
            f"On {machine['device']}{threads}, PyTorch {machine['torch']}; medians of {settings['rounds']} rounds; the "
            f"matmuls alone run at {result['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s:\n",
            f"    mtp-dist bench head-loss {sizes} --heads {heads} \\\n        --modes {modes} --json\n",
            table(header, [head_loss_row(row)[: len(header)] for row in result["rows"]]),
            *([head_loss_image(settings)] if settings["tp"] == 1 else []),
        ]
    )


def head_loss_row(row: dict[str, Any]) -> list[str]:
    start = [str(row["heads"]), row["mode"]]
    if row["peak_bytes"] is None:
        return [*start, "out of memory", *[""] * 6]
    return [
        *start,
        f"{row['seconds']:.3f}",
        "" if row["seconds_relative_to_naive"] is None else f"{row['seconds_relative_to_naive']:.2f}",
        f"{row['fraction_of_matmul_rate']:.0%}",
        f"{row['peak_bytes'] / 2**20:,.1f}",
        f"{row['gradient_error']:.1e}",
        str(row["collectives"]),
        f"{row['collective_bytes'] / 2**20:,.2f}",
    ]


def head_loss_image(settings: dict[str, Any]) -> str:
    return (
        "![Memory and time of the heads' loss against the number of heads]"
        f"(images/{HEAD_LOSS_IMAGES[settings['device']]})\n"
    )


def head_loss_results() -> list[dict[str, Any]]:
    """Return the measurements, CPU before GPU, then by number of ranks."""
    results = [json.loads(path.read_text()) for path in (DOCS / "data").glob("head-loss-*.json")]
    return sorted(results, key=lambda result: (result["settings"]["device"], result["settings"]["tp"]))


def head_loss_sections() -> str:
    results = head_loss_results()
    sections = [head_loss_section(result) for result in results]
    if all(result["settings"]["device"] == "cpu" for result in results):
        sections.append("Nothing has been measured on a GPU yet.\n")
    return "\n".join(sections)


def data_speed_section(result: dict[str, Any]) -> str:
    """Return the tables of `mtp-dist bench data`."""
    machine = result["machine"]
    preparation = [
        [
            row["tokenizer"],
            f"{row['megabytes']:,.0f}",
            f"{row['tokens'] / 1e6:,.0f}",
            f"{row['prepare_megabytes_per_second']:.1f}",
            f"{after:.1f}" if (after := row.get("after_the_start_megabytes_per_second")) else "not measured",
            f"{row['bare_megabytes_per_second']:,.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in result["preparation"]
    ]
    loader = [
        [
            f"{row['sequence_length']:,}",
            f"{row['samples_tokens_per_second'] / 1e6:.0f}",
            f"{row['with_targets_tokens_per_second'] / 1e6:.0f}",
            f"{row['with_document_masks_tokens_per_second'] / 1e6:.0f}",
        ]
        for row in result["loader"]
    ]
    header = [
        "tokenizer",
        "MB of text",
        "million tokens",
        "`prepare` MB/s",
        "after its start",
        "tokenizer alone MB/s",
        "ratio",
    ]
    return "\n".join(
        [
            f"On {machine['processor']}, {result['workers']} workers on {machine['cores']} cores:\n",
            table(header, preparation),
            "The loader, one process, corpus in the page cache, million tokens per second:\n",
            table(["sequence length", "samples", "with the targets of 4 heads", "and masked by document"], loader),
        ]
    )


def resume_matrix(rows: list[dict[str, Any]]) -> str:
    """Return the worst error of the losses for each pair of layouts."""
    layouts = list(dict.fromkeys(row["before"] for row in rows))
    worst = {
        pair: max(row["losses"] for row in rows if (row["before"], row["after"]) == pair)
        for pair in itertools.product(layouts, layouts)
    }
    lines = [[before, *(f"{worst[before, after]:.1e}" for after in layouts)] for before in layouts]
    return table(["saved at \\ opened at", *layouts], lines)


def kills_sentence(counts: dict[str, int]) -> str:
    runs = counts["finished_runs"]
    return (
        f"{counts['kills']} kills, {counts['during_a_save']} of them while a checkpoint was unfinished, over "
        f"{counts['starts']} starts and {runs} run{'s' * (runs > 1)} of {counts['steps']} steps on {counts['ranks']} "
        "ranks: every start found a valid checkpoint or started from scratch, and every run ended with the same "
        "metrics, parameters and moments as the run that was not killed, bitwise.\n"
    )


def checkpoint_speed(results: list[dict[str, Any]]) -> str:
    sections = []
    for result in results:
        layout, machine = result["layout"], result["machine"]
        rows = [
            [label, f"{result['seconds'][way]:.2f}", f"{result['megabytes'] / result['seconds'][way]:,.0f}"]
            for way, label in BENCH_CHECKPOINT_LABELS.items()
        ]
        degrees = f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}"
        sections.append(
            f"{degrees}, {result['megabytes']:,.0f} MB on {machine['processor']}, {machine['cores']} cores; training "
            f"waits {result['stall_share']:.0%} of a save:\n"
        )
        sections.append(table(["", "seconds", "MB/s"], rows))
    return "\n".join(sections)


def monitoring_cost(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        low, _, high = result["ratio_quartiles"]
        rows.append(
            [
                f"{result['parameters'] / 1e6:.1f} M parameters, {' x '.join(map(str, result['layout'].values()))}",
                f"{result['step_seconds']['without']:.3f}",
                f"{result['step_seconds']['with']:.3f}",
                f"{result['ratio'] - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%})",
            ]
        )
    machine = results[0]["machine"]
    header = ["model, tensor x pipeline x data", "seconds per step without", "with", "median ratio, quartiles"]
    shown = table(header, rows)
    return f"On {machine['processor']}, {machine['cores']} cores:\n\n{shown}"


def decoding_results() -> list[dict[str, Any]]:
    """Return the measurements of decoding: generated models by layers, then trained ones."""
    results = [json.loads(path.read_text()) for path in (DOCS / "data").glob("decode-*.json")]
    return sorted(results, key=lambda result: (result["model"]["source"] != "generated", result["model"]["layers"]))


def decoding_title(model: dict[str, Any]) -> str:
    source = "Generated model" if model["source"] == "generated" else f"Byte model, `{model['source']}`"
    return (
        f"{source}, {model['parameters'] / 1e6:.1f} M parameters, {model['layers']} layers with head 1, hidden size "
        f"{model['hidden']}, vocabulary {model['vocab']:,}, {model['heads']} {model['kind']} heads"
    )


def decoding_speed(results: list[dict[str, Any]]) -> str:
    """Return one table per model, with 2, 4, 8, ... of the fixed numbers of heads."""
    header = ["batch", "", "tokens/s", "speed-up", "tokens per pass", "ratio", "attainable", "acceptance by distance"]
    sections = []
    for result in results:
        machine, settings = result["machine"], result["settings"]
        shown = {f"k = {2**power}" for power in range(1, 11)} | {f"k = {result['model']['heads']}"}
        rows = [
            decoding_row(row)
            for row in result["rows"]
            if not row["variant"].startswith("k = ") or row["variant"] in shown
        ]
        place = machine["processor"] if machine["device"] == "CPU" else machine["device"]
        sections.append(
            f"{decoding_title(result['model'])}; {settings['dtype']}, {settings['prompt_tokens']} + "
            f"{settings['new_tokens']} tokens, {machine['threads']} thread{'s' * (machine['threads'] > 1)} of {place}, "
            f"medians of {settings['rounds']} rounds:\n"
        )
        sections.append(table(header, rows))
    return "\n".join(sections)


def decoding_row(row: dict[str, Any]) -> list[str]:
    per_pass = [f"{row[name]:.2f}" if name in row else "" for name in ("tokens_per_forward", "ratio", "attainable")]
    acceptance = " ".join(f"{fraction:.2f}" for fraction in row.get("acceptance", {}).values())
    rates = [f"{row['tokens_per_second']:,.0f}", f"{row['speed_up']:.2f}"]
    return [str(row["batch"]), row["variant"], *rates, *per_pass, acceptance]


def decoding_bounds(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        model = result["model"]
        name = f"{'generated' if model['source'] == 'generated' else 'byte model'}, {model['layers']} layers"
        for bound in result["bounds"]:
            least, most = bound["at_least"], bound["at_most"]
            limit = f"at least {least:.2f}" if least is not None else f"at most {most:.3f}"
            batch = "" if bound["batch"] is None else str(bound["batch"])
            value = f"{bound['value']:.3f}"
            rows.append([name, bound["name"], batch, value, limit, "yes" if bound["holds"] else "**no**"])
    return table(["model", "figure", "batch", "measured", "limit", "holds"], rows)


def decoding_paper(results: list[dict[str, Any]]) -> str:
    """Return the speed-ups of Gloeckle et al. 2024, tables S2 and S3, next to those of the trained models."""
    header = ["model", "heads", "batch", "speed-up", "tokens per pass", "ratio"]
    rows = [
        ["paper, 7B on code", "4", "42", "3.05", "3.50", "0.87"],
        ["paper, 7B on bytes", "8", "16", "6.39", "7.04", "0.91"],
    ]
    for result in results:
        model = result["model"]
        name = f"ours, {model['parameters'] / 1e6:.1f} M on bytes"
        for row in result["rows"]:
            if model["source"] != "generated" and row["variant"] in (f"k = {model['heads']}", "adaptive"):
                heads = "adaptive" if row["variant"] == "adaptive" else str(model["heads"])
                rows.append([name, heads, str(row["batch"]), *decoding_row(row)[3:6]])
    return table(header, rows)


def with_tables(page: str, tables: dict[str, str]) -> str:
    return TABLE.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", page)


def pages() -> dict[Path, str]:
    """Return the text of every generated page."""
    tables = {
        "parity": parity_table(json.loads((DOCS / "data/parity.json").read_text())),
        "head-loss": head_loss_sections(),
        "head-runs": head_runs_table(),
        "data-speed": data_speed_section(json.loads((DOCS / "data/data-speed.json").read_text())),
        "resume-matrix": resume_matrix(json.loads((DOCS / "data/resume-matrix.json").read_text())),
        "kills": kills_sentence(json.loads((DOCS / "data/kills.json").read_text())),
        "monitoring": monitoring_cost(
            [json.loads(path.read_text()) for path in sorted((DOCS / "data").glob("monitoring-*.json"))]
        ),
        "checkpoint-speed": checkpoint_speed(
            [json.loads(path.read_text()) for path in sorted((DOCS / "data").glob("checkpoint-*.json"))]
        ),
    }
    decoding = decoding_results()
    tables |= {
        "decoding-paper": decoding_paper(decoding),
        "decoding-bounds": decoding_bounds(decoding),
        "decoding-speed": decoding_speed(decoding),
    }
    filled = {DOCS / name: with_tables((DOCS / name).read_text(), tables) for name in ("benchmarks.md", "decoding.md")}
    return {DOCS / "configuration.md": configuration_page(), **filled}


def _pyplot() -> Any:
    """Return pyplot, imported late because `--check` does not need it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_demo() -> None:
    plt = _pyplot()

    lines = [json.loads(line) for line in (DOCS / "data/demo-metrics.jsonl").read_text().splitlines()]
    summary = json.loads((DOCS / "data/demo-summary.json").read_text())
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for k in range(1, len(summary["validation"][0]["heads"]) + 1):
        training = [(line["step"], line[f"loss/head_{k}"]) for line in lines if f"loss/head_{k}" in line]
        key = f"validation/loss/head_{k}"
        validation = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*training, strict=True), color=f"C{k - 1}", alpha=0.5)
        axes.plot(*zip(*validation, strict=True), "o-", color=f"C{k - 1}", label=f"head {k}: token t+{k}")
    entropy = summary["validation"][0]["unigram_entropy"]
    axes.axhline(entropy, color="black", linestyle=":", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(1.2, 4.2))
    axes.set_title("make demo: training (thin) and validation loss of each head")
    axes.legend(ncols=2)
    figure.savefig(DOCS / "images/demo.png", dpi=110)


def draw_head_loss(result: dict[str, Any]) -> None:
    plt = _pyplot()

    settings = result["settings"]
    figure, (memory, time) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for mode in settings["modes"]:
        rows = [row for row in result["rows"] if row["mode"] == mode and row["peak_bytes"] is not None]
        heads = [row["heads"] for row in rows]
        # Dashed: eager and recompute lie on one another in memory.
        style = "s--" if mode == "recompute" else "o-"
        memory.plot(heads, [row["peak_bytes"] / 2**20 for row in rows], style, label=mode)
        time.plot(heads, [row["seconds"] for row in rows], style, label=mode)
    for axes, label in ((memory, "peak memory (MiB)"), (time, "seconds per step")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(settings["heads"], settings["heads"])
        axes.set(xlabel="heads n", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    memory.legend()
    figure.suptitle(
        f"The heads' loss: {settings['tokens']} tokens, hidden size {settings['hidden']}, vocabulary "
        f"{settings['vocab']:,}, {settings['dtype']}, {settings['device'].upper()}"
    )
    figure.savefig(DOCS / "images" / HEAD_LOSS_IMAGES[settings["device"]], dpi=110)


def draw_decoding(results: list[dict[str, Any]]) -> None:
    """Draw the speed-up against the number of heads, one panel per model, one colour per batch size."""
    plt = _pyplot()

    figure, panels = plt.subplots(1, len(results), figsize=(4 * len(results), 3.6), layout="constrained", squeeze=False)
    for axes, result in zip(panels[0], results, strict=True):
        model = result["model"]
        for color, batch in enumerate(result["settings"]["batch_sizes"]):
            rows = {row["variant"]: row for row in result["rows"] if row["batch"] == batch}
            chains = [rows["plain"], *(rows[f"k = {k}"] for k in range(2, model["heads"] + 1))]
            heads = range(1, model["heads"] + 1)
            axes.plot(heads, [row["speed_up"] for row in chains], f"C{color}o-", label=f"batch {batch}")
            axes.axhline(rows["adaptive"]["speed_up"], color=f"C{color}", linestyle=":", linewidth=1)
            if batch == 1:
                least = [row["attainable"] * row["tokens_per_forward"] for row in chains]
                axes.plot(heads, least, "k--", linewidth=1, label="attainable at batch 1")
                tokens = [row["tokens_per_forward"] for row in chains]
                axes.plot(heads, tokens, color="gray", linewidth=1, label="tokens per pass")
        source = "generated" if model["source"] == "generated" else "trained on bytes"
        axes.set(title=f"{source}, {model['layers']} layers of {model['hidden']}", xlabel="heads k")
        axes.set_xticks(range(1, model["heads"] + 1))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0][0].set(ylabel="speed-up (dotted: adaptive)")
    for axes in panels[0]:
        axes.legend(fontsize=7)
    figure.savefig(DOCS / "images/decoding.png", dpi=110)


def head_runs() -> dict[str, list[dict[str, float]]]:
    """Return the metrics of a short run per kind of head."""
    paths = sorted((DOCS / "data/heads").glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def head_runs_table() -> str:
    """Return the last validation of each run."""
    header = ["run", *(f"head {k}" for k in range(1, 5))]
    rows = []
    for name, records in head_runs().items():
        last = [record for record in records if "validation/loss/head_1" in record][-1]
        rows.append([f"`{name}`", *(f"{last[f'validation/loss/head_{k}']:.3f}" for k in range(1, 5))])
    return table(header, rows)


def draw_head_runs() -> None:
    plt = _pyplot()

    figure, grid = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained", sharey=True)
    for k, axes in enumerate(grid, 1):
        for name, records in head_runs().items():
            curve = [(r["step"], r[f"loss/head_{k}"]) for r in records if f"loss/head_{k}" in r]
            axes.plot(*zip(*curve, strict=True), label=name, linewidth=1.2)
        axes.set(title=f"head {k}", xlabel="step")
        axes.grid(alpha=0.3)
    grid[0].set(ylabel="training loss (nats)", ylim=(1.5, 4))
    grid[-1].legend(fontsize=7)
    figure.savefig(DOCS / "images/head-runs.png", dpi=110)


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
        draw_head_runs()
        draw_decoding(decoding_results())
        for result in head_loss_results():
            if result["settings"]["tp"] == 1:
                draw_head_loss(result)


if __name__ == "__main__":
    main()
