"""`mtp-dist launch`, `selfcheck` and `report`."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mtp_dist.cli.options import AsJson, ConfigFile, Overrides
from mtp_dist.cli.tables import selfcheck_table, show_result
from mtp_dist.config import load_config
from mtp_dist.errors import exits_with_user_errors
from mtp_dist.monitoring.output import silence_import_warnings


def launch(
    arguments: Annotated[list[str], typer.Argument(metavar="--config FILE [section.key=value]...")],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes; by default one per GPU of this machine, or one without a GPU."),
    ] = None,
) -> None:
    """Train on this machine. The other arguments are those of launchers/pretrain.py: --config, --preflight, keys.

    Ctrl-C, SIGTERM and SIGUSR1 reach every rank: the run saves a checkpoint and exits with the ranks' status.
    """
    from mtp_dist.cli.launch import launch as launch_ranks

    if ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    raise typer.Exit(launch_ranks(ranks, arguments))


@exits_with_user_errors
def selfcheck(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare the sharded model with an unsharded plain-PyTorch reference, at the layout of a configuration.

    Start it like training: under torchrun or deepspeed with all ranks. It needs no data. The exit status is 1 if a
    relative error exceeds its tolerance.
    """
    from mtp_dist.verify.startup import check_startup

    job = check_startup(load_config(config, overrides or []), needs_data=False, log_level=logging.WARNING)
    silence_import_warnings()
    from mtp_dist.distributed.topology import close_topology, initialize_topology
    from mtp_dist.verify.selfcheck import selfcheck as compare

    topology = initialize_topology(job.config, job.device)
    comparisons = compare(job.config, topology)
    close_topology()
    passed = all(comparison.passed for comparison in comparisons)
    layout = f"tensor {topology.tp_size} x pipeline {topology.pp_size} x data {topology.dp_size}"
    verdict = Text("passed" if passed else "FAILED: sharded results differ from the single-process reference")
    if topology.rank == 0:
        rows = [asdict(comparison) | {"passed": comparison.passed} for comparison in comparisons]
        result = {"layout": layout, "passed": passed, "comparisons": rows}
        show_result(result, as_json, selfcheck_table(comparisons, layout), verdict)
    raise typer.Exit(0 if passed else 1)


@exits_with_user_errors
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/demo.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="New folder; by default `report` in the first run's folder."),
    ] = None,
) -> None:
    """Write one HTML page with the curves, events and configuration of one run, or of several side by side."""
    from mtp_dist.monitoring.report.page import write_report

    folders = [Path(run).expanduser() for run in runs]
    print(write_report(folders, Path(to).expanduser() if to else folders[0] / "report"), flush=True)
