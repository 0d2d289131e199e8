"""Terminal output of the commands: tables, and lines of facts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from mtp_dist.errors import UserError

if TYPE_CHECKING:  # they import numpy and torch, which would delay `--help`
    from mtp_dist.checkpoint.format import SavedLayout
    from mtp_dist.checkpoint.inspection import CheckpointLine, CheckpointReport
    from mtp_dist.verify.selfcheck import Comparison

NON_TERMINAL_WIDTH = 120


def show_result(result: object, as_json: bool, *parts: RenderableType) -> None:
    """Print a result as one JSON object, or as tables and unbroken lines of text. Raise UserError if that fails."""
    with explain_output_errors():
        if as_json:
            print(json.dumps(result), flush=True)
            return
        console = Console(width=None if os.isatty(1) else NON_TERMINAL_WIDTH)
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, Text))


@contextmanager
def explain_output_errors() -> Iterator[None]:
    """Turn an OSError of standard output, such as a full disk, into a UserError. A closed pipe is not an error."""
    try:
        yield
    except BrokenPipeError:  # ends the command silently
        raise
    except OSError as error:
        # Python writes what is left in the old one's buffer at its exit, and would fail again.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise UserError(
            f"standard output cannot be written ({error.strerror}): send it to a place with room for it"
        ) from None


def fact_lines(facts: Mapping[str, str]) -> Iterator[Text]:
    width = max(map(len, facts)) + 2
    for label, value in facts.items():
        yield Text(f"{label + ':':<{width}}{value}")


def selfcheck_table(comparisons: Sequence[Comparison], layout: str) -> Table:
    table = Table("precision", "quantity", "worst relative error", "tolerance", "where", "", title=layout)
    for c in comparisons:
        verdict = "ok" if c.passed else "WRONG"
        table.add_row(c.precision, c.quantity, f"{c.error:.1e}", f"{c.tolerance:.0e}", c.where, verdict)
    return table


def _layout(layout: SavedLayout | None) -> str:
    if layout is None:
        return "imported"
    return f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}, ZeRO {layout.zero_stage}"


def _losses(losses: Sequence[float | None]) -> str:
    return " ".join("-" if loss is None else f"{loss:.4f}" for loss in losses)


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def checkpoints_table(lines: Sequence[CheckpointLine]) -> Table:
    table = Table("step", "", "size", "saved at", "losses of heads 1, 2, ...", "check of names, sizes, JSON files")
    for line in lines:
        size = "" if line.bytes is None else _size(line.bytes)
        saved_at = "" if line.damage else _layout(line.layout)
        verdict = "DAMAGED" if line.damage else "intact"
        table.add_row(f"{line.step:,}", "latest" * line.latest, size, saved_at, _losses(line.losses), verdict)
    return table


def checkpoint_tables(report: CheckpointReport) -> Iterator[RenderableType]:
    layout, total = report.layout, sum(report.parameters.values())
    processes = f", {layout.world_size} processes" if layout else ""
    yield from fact_lines(
        {
            "Run": report.run,
            "Step": f"{report.step:,}, {report.optimizer_updates:,} updates of Adam",
            "Saved at": f"{_layout(layout)}{processes}",
            "Losses": f"{_losses(report.losses)} nats, heads 1, 2, ..." if report.losses else "none",
            "Vocabulary": f"{report.vocab_size:,} tokens",
            "Versions": ", ".join(f"{name} {version or '-'}" for name, version in report.versions.items()),
            "On disk": ", ".join(f"{kind} {_size(size)}" for kind, size in report.bytes.items()),
            "Integrity": f"all {report.files} files are intact",
        }
    )
    table = Table("part", "parameters", "share", title=f"{total / 1e6:,.2f} M parameters")
    for part, number in report.parameters.items():
        table.add_row(part, f"{number:,}", f"{number / total:.1%}")
    yield table
    table = Table("weight", "number", "shape", "parameters", title="Weights, fp32")
    for group in report.weights:
        shape = " x ".join(map(str, group.shape))
        table.add_row(Text(group.name), f"{group.count}", shape, f"{group.count * prod(group.shape):,}")
    yield table


def head_loss_table(result: dict[str, Any]) -> Table:
    """Return a table with one row per number of heads and mode; out of memory is a result."""
    settings, machine = result["settings"], result["machine"]
    title = (
        f"{settings['tokens']} tokens, hidden size {settings['hidden']}, vocabulary {settings['vocab']}, "
        f"{settings['dtype']}, tensor parallel {settings['tp']}, on {machine['device']}, "
        f"{machine['threads_per_rank']} threads per rank"
    )
    columns = ["heads", "mode", "seconds", "x naive", "peak MiB", "collectives", "collective MiB", "gradient error"]
    table = Table(*columns, title=title)
    for row in result["rows"]:
        cells = ["out of memory"] if row["peak_bytes"] is None else _head_loss_cells(row)
        table.add_row(str(row["heads"]), row["mode"], *cells)
    return table


def _head_loss_cells(row: dict[str, Any]) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        cell(row["seconds"], ".3f"),
        cell(row["seconds_relative_to_naive"], ".2f"),
        cell(row["peak_bytes"] / 2**20, ",.1f"),
        str(row["collectives"]),
        cell(row["collective_bytes"] / 2**20, ",.1f"),
        cell(row["gradient_error"], ".1e"),
    ]


BENCH_CHECKPOINT_LABELS = {
    "stall": "training waits",
    "save": "saved: gathered, written, synced, read back, hashed",
    "torch.save": "torch.save: gathered, written, synced",
    "load": "loaded into the engine",
    "torch.load": "torch.load into memory",
}


def bench_checkpoint_table(result: dict[str, Any]) -> Table:
    layout = " x ".join(f"{axis} {degree}" for axis, degree in result["layout"].items())
    title = f"{result['megabytes']:,.0f} MB, {layout}, training waits {result['stall_share']:.0%} of a save"
    table = Table("", "seconds", "MB/s", title=title)
    for name, label in BENCH_CHECKPOINT_LABELS.items():
        seconds = result["seconds"][name]
        table.add_row(label, f"{seconds:.2f}", f"{result['megabytes'] / seconds:,.0f}")
    return table


def bench_balance_table(result: dict[str, Any]) -> Table:
    by_flops, by_times = (f"{result['predicted_speedup'][name]:.2f}" for name in ("by FLOPs", "by times"))
    sleeping = f", layers sleep {result['sleep_milliseconds']:g} ms" if result["sleep_milliseconds"] else ""
    title = (
        f"Balanced stages are {result['speedup']:.2f} times as fast, predicted {by_flops} by FLOPs, {by_times} by "
        f"times; {result['micro_batches']} micro-batches{sleeping}"
    )
    table = Table("partition", "trunk layers per stage", "seconds per step", "predicted", title=title)
    for row in result["rows"]:
        layers = " ".join(map(str, row["trunk_layers"]))
        table.add_row(row["partition"], layers, f"{row['seconds']:.3f}", f"{row['predicted_seconds']:.3f}")
    return table


def bench_data_tables(result: dict[str, Any]) -> list[Table]:
    """Return a table with one row per tokenizer, and one with one row per sequence length."""
    workers, processor = result["workers"], result["machine"]["processor"]
    preparation = Table(
        *("tokenizer", "MB of text", "prepare MB/s", "after start-up", "tokenizer alone MB/s", "ratio"),
        title=f"prepare: {workers} workers on {processor}",
    )
    for row in result["preparation"]:
        rates = [f"{row[f'{name}_megabytes_per_second']:.1f}" for name in ("prepare", "after_the_start", "bare")]
        preparation.add_row(row["tokenizer"], f"{row['megabytes']:.1f}", *rates, f"{row['ratio']:.2f}")
    loader = Table(
        *("sequence length", "samples: million tokens/s", "with the targets of 4 heads", "masked by document"),
        title="loader: one process, corpus in the page cache",
    )
    for row in result["loader"]:
        names = ("samples", "with_targets", "with_document_masks")
        rates = [f"{row[f'{name}_tokens_per_second'] / 1e6:.0f}" for name in names]
        loader.add_row(str(row["sequence_length"]), *rates)
    return [preparation, loader]


DECODE_COLUMNS = "batch,,tokens/s,speed-up,tokens per pass,ratio,attainable,acceptance by distance".split(",")


def bench_decode_tables(result: dict[str, Any]) -> list[Table]:
    """Return a table with one row per batch size and way to decode, and one with one row per bound."""
    model = result["model"]
    title = (
        f"{model['source']} model: {model['layers']} layers, hidden size {model['hidden']}, vocabulary "
        f"{model['vocab']}, {model['heads']} {model['kind']} heads, {result['settings']['dtype']}, on "
        f"{decode_machine(result['machine'])}"
    )
    ways = Table(title=title)
    for column in DECODE_COLUMNS:
        ways.add_column(column, justify="left" if column in ("", DECODE_COLUMNS[-1]) else "right")
    for row in result["rows"]:
        ways.add_row(*decode_cells(row))
    bounds = Table("bound", Column("batch", justify="right"), Column("value", justify="right"), "limit", "")
    for bound in result["bounds"]:
        bounds.add_row(*bound_cells(bound), "ok" if bound["holds"] else "MISSED")
    return [ways, bounds]


def decode_machine(machine: dict[str, Any]) -> str:
    """Return the GPU, or the processor and the number of threads on it."""
    if machine["device"] != "CPU":
        return machine["device"]
    return f"{machine['threads']} thread{'s' * (machine['threads'] > 1)} of {machine['processor']}"


def decode_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of DECODE_COLUMNS, empty for what is not known of a text that transformers generated."""
    rates = [f"{row['tokens_per_second']:,.0f}", f"{row['speed_up']:.2f}"]
    per_pass = [f"{row[name]:.2f}" if name in row else "" for name in ("tokens_per_forward", "ratio", "attainable")]
    acceptance = " ".join(f"{fraction:.2f}" for fraction in row.get("acceptance", {}).values())
    return [str(row["batch"]), row["variant"], *rates, *per_pass, acceptance]


def bound_cells(bound: dict[str, Any]) -> list[str]:
    """Return the bound's name, batch size, value and limit."""
    least, most = bound["at_least"], bound["at_most"]
    limit = f"at least {least:.2f}" if least is not None else f"at most {most:.3f}"
    return [bound["name"], "" if bound["batch"] is None else str(bound["batch"]), f"{bound['value']:.3f}", limit]


def monitoring_table(result: dict[str, Any]) -> Table:
    title = f"Monitoring: medians of {result['rounds']} rounds of {result['steps_of_a_round']} steps"
    table = Table("seconds per step, with", "without", "ratio", "quartiles of the ratio", title=title)
    seconds = (f"{result['step_seconds'][name]:.4f}" for name in ("with", "without"))
    low, high = result["ratio_quartiles"][0], result["ratio_quartiles"][-1]
    table.add_row(*seconds, f"{result['ratio']:.4f}", f"{low:.4f} to {high:.4f}")
    return table
