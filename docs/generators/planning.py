"""Tables and picture of planning.md: what the planner computes, and results of `mtp-dist bench balance` and `plan`."""

import io
from typing import Any

from generators.common import DATA, DOCS, IMAGES, read_json, read_json_lines, table, with_origin
from rich.console import Console
from rich.text import Text

from mtp_dist.cli.bench_plan_tables import PLAN_COLUMNS, TIME_COLUMNS, bench_plan_cells, plan_time_cells
from mtp_dist.cli.plan import plan_run
from mtp_dist.cli.plan_tables import plan_parts
from mtp_dist.cli.timeline import draw_timelines
from mtp_dist.config import build_config, load_config, resolve
from mtp_dist.planner.balance import arrangements, optimum
from mtp_dist.planner.devices import assumed_rates, find_accelerator
from mtp_dist.planner.fit import fit
from mtp_dist.planner.parts import Parts
from mtp_dist.planner.schedule import simulate
from mtp_dist.planner.stage_cost import part_flops
from mtp_dist.planner.stage_times import Cluster

CONFIGS = DOCS.parent / "configs"
LAYERS, STAGES, VOCABULARIES = 28, (4, 8, 16), (32_000, 131_072, 262_144)
NAMES = {
    "uniform": "1F1B, uniform",
    "balanced": "1F1B, balanced",
    "dualpipev": "DualPipeV",
    "balanced, split heads": "1F1B, split heads",
    "dualpipev, split heads": "DualPipeV, split heads",
}
MEASURED_COLUMNS = (
    "stages",
    "uniform",
    "balanced",
    "uniform: seconds per step / predicted",
    "balanced: seconds per step / predicted",
    "speed-up",
    "predicted by times",
    "by FLOPs",
)
DRAWN_STAGES, DRAWN_MICRO_BATCHES = 4, 12


def tables() -> dict[str, str]:
    rows = [cells(ranks, vocabulary) for ranks in STAGES for vocabulary in VOCABULARIES]
    measured = read_json("balance-*.json")
    return {
        "balance": table(["PP", "V", *NAMES.values(), "optimum"], rows),
        "plan": plan_output(64, search_all=True),
        "plan-advice": plan_output(64, search_all=False, overrides=("parallel.pipeline=8",), last_lines=1),
        "balance-measured": with_origin(table(MEASURED_COLUMNS, map(measured_cells, measured)), *measured),
        "memory": memory(*read_json("plan/memory.json")),
        "times": times(*read_json("plan/times.json")),
        "gpu-memory": gpu_memory(read_json("gpu/*.json")),
    }


def plan_output(gpus: int, search_all: bool, overrides: tuple[str, ...] = (), last_lines: int = 0) -> str:
    """Return what `mtp-dist plan` prints for the 7B model on H100s; all of it, or its last parts."""
    config = load_config(CONFIGS / "models/7b.yaml", ["model.vocab_size=128256", *overrides])
    h100 = find_accelerator("h100")
    cluster = Cluster(h100, assumed_rates(h100, config.train.precision))
    _, result = plan_run(config, cluster, gpus, 200e9, search_all)
    console = Console(file=io.StringIO(), width=116)
    for part in [*plan_parts(result | {"preflight": None})][-last_lines:]:
        console.print(part, soft_wrap=isinstance(part, Text))
    lines = console.file.getvalue().splitlines()
    return "".join(f"    {line}".rstrip() + "\n" for line in lines)


def measured_cells(result: dict[str, Any]) -> list[str]:
    """Return a row with the times of uniform and of balanced stages, and how much faster these are."""
    sleep = result["sleep_milliseconds"]
    steps = (f"{row['seconds']:.2f} / {row['predicted_seconds']:.2f}" for row in result["rows"])
    layers = (" ".join(map(str, row["trunk_layers"])) for row in result["rows"])
    predicted = (f"{result['predicted_speedup'][name]:.2f}" for name in ("by times", "by FLOPs"))
    what = f"layers sleep {sleep:g} ms" if sleep else "computation"
    return [f"{result['layout']['pipeline']}, {what}", *layers, *steps, f"{result['speedup']:.2f}", *predicted]


def memory(result: dict[str, Any]) -> str:
    """Return one row per stage of each configuration, in MB."""
    return with_origin(table(PLAN_COLUMNS, map(bench_plan_cells, result["memory"])), result)


def times(result: dict[str, Any]) -> str:
    """Return one row per stage of each pipeline."""
    return with_origin(table(TIME_COLUMNS, map(plan_time_cells, result["times"])), result)


def gpu_memory(runs: list[dict[str, Any]]) -> str:
    """Return the predicted and the measured peak of each training on one GPU."""
    rows = []
    for run, path in zip(runs, sorted(DATA.glob("gpu/*.jsonl")), strict=True):
        config = build_config(run["config"])
        predicted = fit(resolve(config, config.vocab_size, 1)).binding.memory.total
        measured = max(line.get("memory/peak_bytes", 0) for line in read_json_lines(path))
        name = run["device"].removeprefix("NVIDIA ")
        rows.append([name, f"{predicted / 1e9:.2f}", f"{measured / 1e9:.2f}", f"{predicted / measured - 1:+.1%}"])
    return with_origin(table(["GPU", "predicted GB", "measured GB", "difference"], rows), *runs)


def cells(ranks: int, vocabulary: int) -> list[str]:
    """Return the balance of each arrangement that has no empty stage."""
    parts = parts_of_7b(vocabulary)
    found = arrangements(parts, LAYERS, ranks)
    shown = [f"{found[name].balance(parts):.2f}" if name in found else "-" for name in NAMES]
    return [str(ranks), f"{vocabulary:,}", *shown, f"{optimum(parts, LAYERS, ranks):.2f}"]


def parts_of_7b(vocabulary: int) -> Parts:
    """Return the costs of the parts of a 7B model with four heads, in forward passes of a trunk layer."""
    config = build_config(
        {
            "model": {
                "hidden_size": 4096,
                "trunk_layers": LAYERS,
                "num_attention_heads": 32,
                "ffn_hidden_size": 11008,
            },
            "heads": {"count": 4},
            "data": {"train": [{"path": "python-stdlib"}]},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 4096},
        }
    )
    flops = part_flops(resolve(config, vocabulary, 1))
    return flops.scaled(1 / flops.layer.forward)


def draw() -> None:
    parts = parts_of_7b(131_072)
    found = arrangements(parts, LAYERS, DRAWN_STAGES)
    timelines = {
        title: simulate(found[name].schedule, found[name].passes(parts), DRAWN_MICRO_BATCHES)
        for name, title in NAMES.items()
    }
    draw_timelines(timelines, IMAGES / "schedules.png", "forward passes of a trunk layer")
