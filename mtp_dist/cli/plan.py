"""`mtp-dist plan`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtp_dist.cli.options import AsJson, ConfigFile, Overrides
from mtp_dist.cli.tables import show_result
from mtp_dist.config import Config, load_config, resolve, with_device_memory
from mtp_dist.errors import LaunchError, UserError, exits_with_user_errors

if TYPE_CHECKING:
    from mtp_dist.planner.estimate import StepEstimate
    from mtp_dist.planner.stage_times import Cluster

PICTURES = (".svg", ".png")
MOST_GPUS = 1_000_000
MICRO_BATCHES_DRAWN = 4
"""Micro-batches per pipeline rank in a picture."""
SUFFIXES = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@exits_with_user_errors
def plan(
    config: ConfigFile,
    gpus: Annotated[
        int, typer.Option(min=1, max=MOST_GPUS, help="Number of GPUs, one rank each; of --gpu cpu number of ranks.")
    ],
    gpu: Annotated[str, typer.Option(help="Type of GPU: a100, a100-40gb, h100, h200, b200, mi300x, cpu, ...")],
    overrides: Overrides = None,
    search_all: Annotated[
        bool, typer.Option("--search", help="Try every layout instead of the configuration's, and show the fastest.")
    ] = False,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens to train on, such as 200B; by default those of train.steps.")
    ] = None,
    preflight: Annotated[
        str | None, typer.Option(metavar="FILE", help="preflight.json of a training with --preflight: measured rates.")
    ] = None,
    timeline: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw the pipeline's timeline into a .svg or .png file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, speed and cost of a training on GPUs that need not be here.

    The exit status is 1 if it does not fit the memory.
    """
    from mtp_dist.cli.plan_tables import plan_parts
    from mtp_dist.planner.calibration import measured_rates
    from mtp_dist.planner.devices import assumed_rates, find_accelerator
    from mtp_dist.planner.stage_times import Cluster

    if timeline is not None and Path(timeline).suffix not in PICTURES:
        raise LaunchError(f"--timeline = '{timeline}' does not end with {' or '.join(PICTURES)}: name such a file")
    accelerator, wanted = find_accelerator(gpu), None if tokens is None else read_tokens(tokens)
    run = with_vocabulary(load_config(config, overrides or []))
    rates = assumed_rates(accelerator, run.train.precision)
    cluster = Cluster(accelerator, measured_rates(rates, preflight) if preflight else rates)
    step, result = plan_run(run, cluster, gpus, wanted, search_all)
    result["preflight"] = preflight
    show_result(result, as_json, *plan_parts(result))
    if timeline is not None:
        _draw(step, Path(timeline))
    raise typer.Exit(0 if result["memory"]["fits"] else 1)


def plan_run(
    config: Config, cluster: Cluster, gpus: int, tokens: float | None, search_all: bool
) -> tuple[StepEstimate, dict[str, Any]]:
    """Return the plan of the configuration's layout, or of the fastest one, with the estimate that it is made of.

    config: has the vocabulary size. Raise ConfigError if the layout, or every layout, does not suit the GPUs.
    """
    from mtp_dist.planner.estimate import estimate
    from mtp_dist.planner.fit import fit
    from mtp_dist.planner.plan import layout_row, plan
    from mtp_dist.planner.search import search

    total = tokens or config.train.steps * config.train.global_batch_size * config.train.sequence_length
    if not search_all:
        resolved = with_device_memory(resolve(config, config.vocab_size, gpus), cluster.memory)
        step = estimate(fit(resolved, cluster.device), cluster)
        return step, plan(step, total)
    found = search(config, cluster, gpus)
    layouts = [layout_row(each, total) for each in found.fastest]
    step = found.fastest[0]
    return step, plan(step, total) | {"fitting": found.fitting, "layouts": layouts}


def read_tokens(text: str) -> float:
    """Return the number of a text such as 200B. Raise LaunchError if it is not a positive, finite number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if match and (number := float(match[1]) * SUFFIXES[match[2].upper()]) >= 1 and number < math.inf:
        return number
    raise LaunchError(f"--tokens = '{text}' is not a number of tokens: write it as 200B, 1.5T or 2e11")


def with_vocabulary(config: Config) -> Config:
    """Return the configuration with the vocabulary size of its tokenizer, unless it has one.

    Raise UserError if the tokenizer cannot be used.
    """
    if config.model.vocab_size is not None:
        return config
    from mtp_dist.data.build_tokenizer import build_tokenizer
    from mtp_dist.planner.layouts import replace_values

    try:
        vocab_size = build_tokenizer(config.data.tokenizer).vocab_size
    except UserError as error:
        raise UserError(
            f"{error}; to plan without it, give its number of tokens, such as model.vocab_size=32000"
        ) from None
    return replace_values(config, {"model.vocab_size": vocab_size})


def _draw(step: StepEstimate, path: Path) -> None:
    """Draw the timeline of a step, of its first micro-batches if there are many."""
    from mtp_dist.cli.timeline import draw_timelines
    from mtp_dist.fs import explain_os_errors
    from mtp_dist.planner.estimate import timeline

    config = step.fit.config
    shown = min(config.micro_batches, MICRO_BATCHES_DRAWN * config.parallel.pipeline)
    title = f"{config.parallel.schedule}, {shown} of {config.micro_batches} micro-batches"
    with explain_os_errors(path, "write"):
        draw_timelines({title: timeline(step, shown)}, path)
