"""The `mtp-dist bench` commands."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mtp_dist.config import load_config
from mtp_dist.errors import ConfigError, UserError
from mtp_dist.monitoring.output import silence_import_warnings
from mtp_dist.pretrain import exit_with_error

bench = typer.Typer(no_args_is_help=True, help="Measure a part of this project beside its peers.")


def _show(result: dict[str, Any], as_json: bool, *tables: Table) -> None:
    """As one JSON object, or as tables."""
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        Console(width=None if os.isatty(1) else 120).print(*tables, sep="\n")


@bench.command("head-loss")
def head_loss(
    tokens: Annotated[int | None, typer.Option(help="of one micro-batch; 2048 on a CPU, 8192 on a GPU")] = None,
    hidden: Annotated[int | None, typer.Option(help="hidden size; 512 on a CPU, 4096 on a GPU")] = None,
    vocab: Annotated[int | None, typer.Option(help="vocabulary; 32000 on a CPU, 128256 on a GPU")] = None,
    heads: Annotated[str, typer.Option(help="numbers of heads, with commas between")] = "1,2,4,8",
    tp: Annotated[int, typer.Option(help="tensor-parallel degree: starts as many processes")] = 1,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; fp32 on a CPU, bf16 on a GPU")] = None,
    modes: Annotated[
        str | None, typer.Option(help="with commas between; all that can run here but, on a CPU, compiled")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Memory, time, communication and error of the heads' loss against the number of heads.

    Modes: naive, eager and recompute are this project's; pytorch, compiled, liger and cut-cross-entropy are peers.
    """
    from mtp_dist.bench.head_loss.measurement import measure_head_loss
    from mtp_dist.bench.head_loss.report import table
    from mtp_dist.bench.head_loss.settings import read_settings

    try:
        settings = read_settings(heads, tp, modes, device, tokens=tokens, hidden=hidden, vocab=vocab, dtype=dtype)
        result = measure_head_loss(settings, silence_import_warnings)
    except UserError as error:
        exit_with_error(error)
    _show(result, as_json, table(result))


@bench.command("checkpoint")
def checkpoint(
    config: Annotated[str, typer.Option(help="YAML file of the run whose model and layout are taken")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    to: Annotated[str, typer.Option(help="a new folder on the disk to measure")] = "bench-checkpoint",
    rounds: Annotated[int, typer.Option(min=1, help="of which the medians are shown")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """How fast checkpoints are saved and loaded, and how long training waits, beside torch.save of the same bytes.

    Start it like training: under torchrun or deepspeed with all ranks. It needs no data.
    """
    from mtp_dist.verify.startup import check_startup

    folder = Path(to).expanduser()
    try:
        job = check_startup(load_config(config, overrides or []), needs_data=False)
        if folder.exists():
            raise ConfigError(f"--to = '{to}' exists: name a new folder")
    except UserError as error:
        exit_with_error(error)
    silence_import_warnings()
    from mtp_dist.bench.checkpoint.measurement import measure_checkpoints
    from mtp_dist.bench.checkpoint.report import table
    from mtp_dist.distributed.topology import close_topology, initialize_topology

    try:
        topology = initialize_topology(job.config, job.device)
        result = measure_checkpoints(job.config, topology, folder, rounds)
    except UserError as error:
        exit_with_error(error)
    close_topology()
    if topology.rank == 0:
        _show(result, as_json, table(result))


@bench.command("data")
def data(
    folder: Annotated[str, typer.Argument(metavar="FOLDER")],
    glob: Annotated[str, typer.Option(help="which of its files")] = "**/*.py",
    tokenizer: Annotated[
        list[str] | None, typer.Option(help="may be repeated; bytes, and one trained on the files, when absent")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; as many as there are cores")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="of which the medians are shown")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """How fast text becomes a corpus, beside the tokenizer alone, and a corpus training samples."""
    from mtp_dist.bench.data.loading import measure_loader
    from mtp_dist.bench.data.preparation import TRAINED, measure_preparation
    from mtp_dist.bench.data.report import tables
    from mtp_dist.bench.measure import processor_name, usable_cores

    processes = workers or usable_cores()
    try:
        preparation = measure_preparation(folder, glob, tokenizer or ["bytes", TRAINED], processes, rounds)
    except UserError as error:
        exit_with_error(error)
    machine = {"processor": processor_name(), "cores": usable_cores()}
    silence_import_warnings()
    loader = measure_loader(rounds)
    result = {"machine": machine, "workers": processes, "preparation": preparation, "loader": loader}
    _show(result, as_json, *tables(result))


@bench.command("monitoring")
def monitoring(
    config: Annotated[str, typer.Option(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="of `log.every` steps each, of which the medians are shown")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """How much longer a step takes for all that is measured, watched and logged, beside the same step without.

    Start it like training: under torchrun or deepspeed with all ranks.
    """
    from mtp_dist.verify.startup import check_startup

    try:
        job = check_startup(load_config(config, overrides or []))
    except UserError as error:
        exit_with_error(error)
    silence_import_warnings()
    from mtp_dist.bench.monitoring import measure_monitoring, table
    from mtp_dist.distributed.topology import close_topology, initialize_topology

    try:
        topology = initialize_topology(job.config, job.device)
        result = measure_monitoring(job.config, topology, rounds)
    except UserError as error:
        exit_with_error(error)
    close_topology()
    if topology.rank == 0:
        _show(result, as_json, table(result))
