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


bench = typer.Typer(no_args_is_help=True, help="Measure a part of this project beside its peers.")
app.add_typer(bench, name="bench")


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
        result = measure_head_loss(settings, quieten_packages)
    except ConfigError as error:
        stop(error)
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        Console(width=None if os.isatty(1) else 120).print(table(result))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
