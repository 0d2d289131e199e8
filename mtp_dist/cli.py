"""The `mtp-dist` command."""

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mtp_dist.config import ConfigError, load_config
from mtp_dist.pretrain import check_before_start, quieten_packages, stop

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback(help="Pretrain and use language models that predict several tokens at once.")
def _options(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0) -> None:
    """The deepspeed launcher passes --local_rank to every rank; the environment says the same."""


@app.command()
def selfcheck(
    config: Annotated[str, typer.Option(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Compare the sharded model with an unsharded plain-PyTorch reference, at the layout of a configuration.

    Start it like training: under torchrun or deepspeed with all ranks. It needs no data. Exit status 1 where a
    relative error is beyond its tolerance.
    """
    try:
        settings = load_config(config, overrides or [])
        check_before_start(settings, needs_data=False)
    except ConfigError as error:
        stop(error)
    quieten_packages()
    from mtp_dist.data.tokenizer import vocabulary_size
    from mtp_dist.parallel.device import select_device
    from mtp_dist.parallel.topology import close_topology, initialize_topology
    from mtp_dist.training.selfcheck import selfcheck as compare

    topology = initialize_topology(settings, select_device(settings))
    comparisons = compare(settings, vocabulary_size(settings), topology)
    close_topology()
    passed = all(comparison.passed for comparison in comparisons)
    layout = f"tensor {topology.tensor} x pipeline {topology.pipeline} x data {topology.data}"
    if topology.rank == 0 and as_json:
        rows = [asdict(comparison) | {"passed": comparison.passed} for comparison in comparisons]
        print(json.dumps({"layout": layout, "passed": passed, "comparisons": rows}), flush=True)
    elif topology.rank == 0:
        table = Table("precision", "quantity", "worst relative error", "tolerance", "where", "", title=layout)
        for c in comparisons:
            verdict = "ok" if c.passed else "WRONG"
            table.add_row(c.precision, c.quantity, f"{c.error:.1e}", f"{c.tolerance:.0e}", c.where, verdict)
        Console(width=None if os.isatty(1) else 120).print(table)
        print("passed" if passed else "FAILED: this layout does not compute what one process computes", flush=True)
    raise typer.Exit(0 if passed else 1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
