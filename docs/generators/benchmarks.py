"""Tables of benchmarks.md that have no picture."""

import itertools
from typing import Any

from generators.common import DATA, read_json, read_json_lines, table, with_origin

from mtp_dist.cli.tables import BENCH_CHECKPOINT_LABELS


def tables() -> dict[str, str]:
    return {
        "parity": parity_table(*read_json("parity.json")),
        "gpu-training": gpu_training(read_json("gpu/*.json")),
        "data-speed": data_speed_section(*read_json("data-speed.json")),
        "resume-matrix": resume_matrix(*read_json("resume-matrix.json")),
        "kills": kills_sentence(*read_json("kills.json")),
        "monitoring": monitoring_cost(read_json("monitoring-*.json")),
        "checkpoint-speed": checkpoint_speed(read_json("checkpoint-*.json")),
    }


def parity_table(result: dict[str, Any]) -> str:
    """Return one row per layout: the worst error over ZeRO stages, accumulation steps and numbers of heads."""
    records, rows = result["runs"], []
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
    return with_origin(table([*header, "20-step curve, bf16"], rows), result)


def gpu_training(runs: list[dict[str, Any]]) -> str:
    """Return the lowest and highest speed of each run after its start."""
    rows = []
    for run, path in zip(runs, sorted(DATA.glob("gpu/*.jsonl")), strict=True):
        lines = [line for line in read_json_lines(path) if line["step"] >= 15 and "throughput/mfu" in line]
        speeds, shares = ([line[f"throughput/{name}"] for line in lines] for name in ("tokens_per_second", "mfu"))
        cells = f"{min(speeds):,.0f} to {max(speeds):,.0f}", f"{min(shares):.1%} to {max(shares):.1%}"
        rows.append([run["device"].removeprefix("NVIDIA "), *cells])
    return with_origin(table(["GPU", "tokens/s from step 15 on", "MFU"], rows), *runs)


def data_speed_section(result: dict[str, Any]) -> str:
    """Return the tables of `mtp-dist bench data`."""
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
            f"{result['workers']} workers:\n",
            with_origin(table(header, preparation), result),
            "The loader, one process, corpus in the page cache, million tokens per second:\n",
            with_origin(
                table(["sequence length", "samples", "with the targets of 4 heads", "and masked by document"], loader),
                result,
            ),
        ]
    )


def resume_matrix(result: dict[str, Any]) -> str:
    """Return the worst error of the losses for each pair of layouts."""
    rows = result["rows"]
    layouts = list(dict.fromkeys(row["before"] for row in rows))
    worst = {
        pair: max(row["losses"] for row in rows if (row["before"], row["after"]) == pair)
        for pair in itertools.product(layouts, layouts)
    }
    lines = [[before, *(f"{worst[before, after]:.1e}" for after in layouts)] for before in layouts]
    return with_origin(table(["saved at \\ opened at", *layouts], lines), result)


def kills_sentence(counts: dict[str, Any]) -> str:
    runs = counts["finished_runs"]
    sentence = (
        f"{counts['kills']} kills, {counts['during_a_save']} of them while a checkpoint was unfinished, over "
        f"{counts['starts']} starts and {runs} run{'s' * (runs > 1)} of {counts['steps']} steps on {counts['ranks']} "
        "ranks: every start found a valid checkpoint or started from scratch, and every run ended with the same "
        "metrics, parameters and moments as the run that was not killed, bitwise.\n"
    )
    return with_origin(sentence, counts)


def checkpoint_speed(results: list[dict[str, Any]]) -> str:
    sections = []
    for result in results:
        layout = result["layout"]
        rows = [
            [label, f"{result['seconds'][way]:.2f}", f"{result['megabytes'] / result['seconds'][way]:,.0f}"]
            for way, label in BENCH_CHECKPOINT_LABELS.items()
        ]
        degrees = f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}"
        sections.append(
            f"{degrees}, {result['megabytes']:,.0f} MB; training waits {result['stall_share']:.0%} of a save:\n"
        )
        sections.append(with_origin(table(["", "seconds", "MB/s"], rows), result))
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
    header = ["model, tensor x pipeline x data", "seconds per step without", "with", "median ratio, quartiles"]
    return with_origin(table(header, rows), *results)
