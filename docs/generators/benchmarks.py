"""Tables of benchmarks.md that have no picture."""

import itertools
from typing import Any

from generators.common import read_json, table

from mtp_dist.cli.tables import BENCH_CHECKPOINT_LABELS


def tables() -> dict[str, str]:
    return {
        "parity": parity_table(*read_json("parity.json")),
        "data-speed": data_speed_section(*read_json("data-speed.json")),
        "resume-matrix": resume_matrix(*read_json("resume-matrix.json")),
        "kills": kills_sentence(*read_json("kills.json")),
        "monitoring": monitoring_cost(read_json("monitoring-*.json")),
        "checkpoint-speed": checkpoint_speed(read_json("checkpoint-*.json")),
    }


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
