"""Output of `mtp-dist plan`."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from mtp_dist.cli.tables import fact_lines
from mtp_dist.planner.fit import COMPONENTS
from mtp_dist.planner.layouts import overrides
from mtp_dist.planner.memory import USABLE_FRACTION

RATE_UNITS = {"matmul": 1e12, "link": 1e9, "network": 1e9}
MFU_CONVENTION = "6 FLOPs per parameter and position, attention over all keys, nothing for recomputation"


def plan_parts(result: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the parts of a plan: the layout, memory, time, and the fastest layouts."""
    yield from fact_lines(_facts(result))
    yield _memory_table(result["memory"])
    yield from map(Text, _memory_verdict(result))
    yield _time_table(result)
    if result["advice"]:
        yield Text(f"balance: {result['advice']}")
    if "layouts" in result:
        yield _layouts_table(result)
        yield Text("\n".join(_pasteable(result["layouts"])))


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    layout, stages = result["layout"], " ".join(map(str, result["trunk_layers_per_stage"]))
    rates, assumed, head_stages = result["rates"], result["assumed"], layout["heads.stages"]
    origin = (
        f"measured by {result['preflight']}"
        if result.get("preflight")
        else f"assumed, {assumed['matmul']:.0%} of the peak and {assumed['bandwidth']:.0%} of the bandwidths"
    )
    matmul, link, network = (_three_digits(rates[name] / unit) for name, unit in RATE_UNITS.items())
    seconds, days, hours = (_three_digits(result[name]) for name in ("step_seconds", "days", "gpu_hours"))
    facts = {
        "model": f"{result['name']}, {_parameters(result['parameters'])} parameters, {result['heads']} "
        f"{result['kind']} heads, {result['precision']}, sequences of {result['sequence_length']:,} tokens",
        "on": f"{result['gpus']:,} x {result['label']} ({result['source']})",
        "layout": f"tensor {layout['parallel.tensor']} x pipeline {layout['parallel.pipeline']} x data "
        f"{result['data_parallel']}, {layout['parallel.schedule']}, trunk layers per stage {stages}, heads on the last "
        f"{f'{head_stages} stages' if head_stages > 1 else 'one'}, "
        f"{result['micro_batches']:,} micro-batches of {layout['train.micro_batch_size']} per step",
        "rates": f"large matmuls {matmul} TFLOP/s, links {link} GB/s, network {network} GB/s: {origin}; layers "
        f"reach {assumed['layer']:.0%} of large matmuls (assumed)",
        "speed": f"{result['tokens_per_second']:,.0f} tokens/s, {seconds} s per step, MFU {result['mfu']:.1%} "
        f"({MFU_CONVENTION})",
        "cost": f"{_tokens(result['tokens'])} tokens: {days} days, {hours} GPU hours",
    }
    if longest := result["longest_sequence"]:
        facts["longest"] = f"sequences of {longest:,} tokens fit {USABLE_FRACTION:.0%} of the memory with this layout"
    return facts


def _parameters(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _three_digits(number: float) -> str:
    """Return a number with at least three significant digits, without an exponent unless it is tiny."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _tokens(number: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g}{suffix}"
    return f"{number:,.0f}"


def _memory_table(memory: Mapping[str, Any]) -> Table:
    """Return a table with one row per component and one column per pipeline rank: the first, largest and last ones."""
    ranks = memory["ranks"]
    shown = [rank for rank in ranks if rank["rank"] in {0, 1, memory["binding"], len(ranks) - 1}]
    title = f"GB by pipeline rank, of {memory['limit'] / 1e9:.0f}"
    table = Table("", *(Column(_rank_name(rank, memory), justify="right") for rank in shown), title=title)
    table.add_row("trunk layers", *("+".join(map(str, rank["trunk_layers"])) for rank in shown))
    table.add_row("micro-batches in flight", *(str(rank["in_flight"]) for rank in shown), end_section=True)
    for name, label in COMPONENTS.items():
        if any(rank[name] for rank in shown):
            table.add_row(label, *(f"{rank[name] / 1e9:.2f}" for rank in shown))
    table.add_section()
    table.add_row("peak", *(f"{rank['total'] / 1e9:.2f}" for rank in shown))
    return table


def _rank_name(rank: Mapping[str, Any], memory: Mapping[str, Any]) -> str:
    binds = len(memory["ranks"]) > 1 and rank["rank"] == memory["binding"]
    return f"{rank['rank']}{' (binds)' if binds else ''}"


def _memory_verdict(result: Mapping[str, Any]) -> Iterator[str]:
    memory = result["memory"]
    if memory["fits"]:
        spare = 1 - result["bytes"] / memory["limit"]
        yield (
            "fits" if spare >= 0.1 else f"fits with {spare:.0%} to spare, which is less than the error of the estimate"
        )
        return
    options = [f"{overrides(each['changes'])} ({each['total'] / 1e9:.1f} GB)" for each in memory["remedies"]]
    yield "DOES NOT FIT" + (f": use {' or '.join(options)}" if options else ": use more GPUs, or GPUs with more memory")


def _time_table(result: Mapping[str, Any]) -> Table:
    table = Table(
        "", Column("seconds", justify="right"), Column("share", justify="right"), title="Where a step's time goes"
    )
    for name, seconds in result["parts"].items():
        if seconds > 0.0005 * result["step_seconds"]:
            table.add_row(name, f"{seconds:.3f}", f"{seconds / result['step_seconds']:.1%}")
    table.add_section()
    table.add_row("step", f"{result['step_seconds']:.3f}", "100%")
    return table


LAYOUT_COLUMNS = "tensor,sequence,pipeline,heads,data,schedule,micro-batch,recomputed,GB,s/step,MFU,days".split(",")


def _layouts_table(result: Mapping[str, Any]) -> Table:
    title = (
        f"The fastest of {result['fitting']:,} layouts that fit, each the best of its degrees; heads: stages that have "
        "some of them"
    )
    table = Table("", *(Column(name, justify="right", overflow="fold") for name in LAYOUT_COLUMNS), title=title)
    for number, row in enumerate(result["layouts"], 1):
        layout = row["layout"]
        table.add_row(
            str(number),
            str(layout["parallel.tensor"]),
            "yes" if layout["parallel.sequence"] else "no",
            str(layout["parallel.pipeline"]),
            str(layout["heads.stages"]),
            str(row["data_parallel"]),
            layout["parallel.schedule"],
            str(layout["train.micro_batch_size"]),
            layout["train.activation_checkpointing"],
            f"{row['bytes'] / 1e9:.1f}",
            _three_digits(row["step_seconds"]),
            f"{row['mfu']:.1%}",
            _three_digits(row["days"]),
        )
    return table


def _pasteable(layouts: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each layout as overrides of a command and as sections of a configuration."""
    for number, row in enumerate(layouts, 1):
        sections: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in row["layout"].items():
            section, name = key.split(".")
            sections[section][name] = value
        yield f"# {number}: {overrides(row['layout'])}"
        for section, values in sections.items():
            flow = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()
            yield f"{section}: {flow}"
