"""`mtp-dist bench`: measurements of the user's own machine."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from mtp_dist.cli.bench_plan_tables import bench_plan_tables
from mtp_dist.cli.options import AsJson, Overrides, model_folder
from mtp_dist.cli.progress import bench_progress, progress_bar, updates
from mtp_dist.cli.tables import (
    bench_balance_table,
    bench_checkpoint_table,
    bench_data_tables,
    bench_decode_tables,
    head_loss_table,
    monitoring_table,
    show_result,
)
from mtp_dist.config import load_config
from mtp_dist.errors import LaunchError, exits_with_user_errors
from mtp_dist.monitoring.output import silence_import_warnings
from mtp_dist.provenance import processor_name, provenance, usable_cores

if TYPE_CHECKING:
    from mtp_dist.distributed.topology import Topology
    from mtp_dist.verify.startup import CheckedJob

app = typer.Typer(no_args_is_help=True, help="Measure a part of mtp-dist and compare it with baselines.")


@app.command("head-loss")
@exits_with_user_errors
def head_loss(
    tokens: Annotated[
        int | None, typer.Option(help="Tokens per micro-batch; by default 2048 on a CPU, 8192 on a GPU.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Hidden size; by default 512 on a CPU, 4096 on a GPU.")] = None,
    vocab: Annotated[
        int | None, typer.Option(help="Vocabulary size; by default 32000 on a CPU, 128256 on a GPU.")
    ] = None,
    heads: Annotated[str, typer.Option(help="Numbers of heads, separated by commas.")] = "1,2,4,8",
    tp: Annotated[int, typer.Option(help="Tensor-parallel degree; starts that many processes.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; by default fp32 on a CPU, bf16 on a GPU.")] = None,
    modes: Annotated[
        str | None,
        typer.Option(help="Modes, separated by commas; by default all that run here, on a CPU all but compiled."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure memory, time, communication and error of the heads' loss for several numbers of heads.

    Modes: naive, eager and recompute are those of mtp-dist; pytorch, compiled, liger and cut-cross-entropy are
    baselines.
    """
    from mtp_dist.bench.head_loss.measurement import measure_head_loss
    from mtp_dist.bench.head_loss.settings import read_settings

    settings = read_settings(heads, tp, modes, device, tokens=tokens, hidden=hidden, vocab=vocab, dtype=dtype)
    result = measure_head_loss(settings, bench_progress)
    _show(result, as_json, head_loss_table(result))


@app.command("checkpoint")
@exits_with_user_errors
def checkpoint(
    config: Annotated[str, typer.Option(help="YAML file of the run whose model and layout are measured.")],
    overrides: Overrides = None,
    to: Annotated[str, typer.Option(help="New folder on the disk to measure.")] = "bench-checkpoint",
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are reported.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure saving and loading of checkpoints, and how long training waits, compared with torch.save.

    Start it like training: under torchrun or deepspeed with all ranks. It needs no data.
    """
    from mtp_dist.verify.startup import check_startup

    folder = Path(to).expanduser()
    job = check_startup(load_config(config, overrides or []), needs_data=False, log_level=logging.WARNING)
    if folder.exists():
        raise LaunchError(f"--to = '{to}' exists: name a new folder")
    silence_import_warnings()
    from mtp_dist.bench.checkpoint import measure_checkpoints

    _measure(
        job, lambda topology: measure_checkpoints(job.config, topology, folder, rounds), as_json, bench_checkpoint_table
    )


@app.command("balance")
@exits_with_user_errors
def balance(
    config: Annotated[str, typer.Option(help="YAML file of the run whose pipeline is measured.")],
    overrides: Overrides = None,
    sleep: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="MILLISECONDS",
            help="Let each trunk layer sleep so long per forward pass, and heads in proportion to their FLOPs: a tiny "
            "model checks the schedule on more processes than there are cores.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are reported.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure training steps with uniform and balanced pipeline stages, compared with the planner's prediction.

    Start it like training: under torchrun or deepspeed with all ranks. It needs no data.
    """
    from mtp_dist.verify.startup import check_startup

    job = check_startup(load_config(config, overrides or []), needs_data=False, log_level=logging.WARNING)
    if job.config.parallel.pipeline == 1:
        raise LaunchError("parallel.pipeline is 1, which has nothing to balance: raise it, and start as many processes")
    if job.config.parallel.schedule != "1f1b" or job.config.heads.stages > 1:
        raise LaunchError(
            "bench balance measures 1f1b with all heads on the last stage: set parallel.schedule=1f1b heads.stages=1"
        )
    if job.config.model.trunk_layers < job.config.parallel.pipeline - 1:
        raise LaunchError(
            f"model.trunk_layers is {job.config.model.trunk_layers}, a uniform partition over parallel.pipeline = "
            f"{job.config.parallel.pipeline} stages needs {job.config.parallel.pipeline - 1}: lower parallel.pipeline"
        )
    silence_import_warnings()
    from mtp_dist.bench.balance import measure_balance

    _measure(job, lambda topology: measure_balance(job.config, topology, rounds, sleep), as_json, bench_balance_table)


@app.command("data")
@exits_with_user_errors
def data(
    folder: Annotated[str, typer.Argument(metavar="FOLDER")],
    glob: Annotated[str, typer.Option(help="Files of the folder to read.")] = "**/*.py",
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(help="Tokenizer; may be repeated. By default bytes, and one trained on the files."),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; by default one per core.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are reported.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure `prepare` compared with its tokenizer alone, and reading training samples from a corpus."""
    from mtp_dist.bench.data import TRAINED, measure_loader, measure_preparation

    processes = workers or usable_cores()
    preparation = measure_preparation(folder, glob, tokenizer or ["bytes", TRAINED], processes, rounds)
    machine = {"processor": processor_name(), "cores": usable_cores()}
    silence_import_warnings()
    loader = measure_loader(rounds)
    result = {"machine": machine, "workers": processes, "preparation": preparation, "loader": loader}
    _show(result, as_json, *bench_data_tables(result))


@app.command("decode")
@exits_with_user_errors
def decode(
    model: Annotated[
        str | None,
        typer.Option(help="Folder of an export, of a checkpoint or of a run; by default a model is generated."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=2, help="Layers of trunk and head 1 of a generated model; 8 by default.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(min=64, help="Its hidden size; 512 by default.")] = None,
    heads: Annotated[int | None, typer.Option(min=2, help="Its number of heads; 4 by default.")] = None,
    kind: Annotated[str | None, typer.Option(help="Their kind: parallel, the default, or sequential.")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Its vocabulary size; 32000 by default.")] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="How often its drafts are right if those before are; 0.9 by default.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; medians are reported.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; by default fp32 on a CPU, bf16 on a GPU.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure decoding with the heads compared with plain decoding, with transformers, and with what the device allows.

    A generated model writes a known text; its weights make the heads as often right as --acceptance asks for.
    """
    from mtp_dist.bench.decode.settings import read_generated, read_settings

    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kind": kind, "vocab": vocab}
    generated = sizes | {"acceptance": acceptance}
    given = [name for name, value in generated.items() if value is not None]
    if model is not None and given:
        raise LaunchError(f"--{given[0]} is for generated models: remove it or --model")
    settings = read_settings(batch, prompt_tokens, new_tokens, rounds, device, dtype)
    trained, wanted = None if model is None else model_folder(model), read_generated(generated)
    silence_import_warnings()
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from mtp_dist.bench.decode.measurement import measure_decoding
    from mtp_dist.bench.decode.subject import generated_subject, trained_subject

    subject = trained_subject(trained, settings) if trained else generated_subject(wanted, settings)
    with progress_bar() as bar:
        result = measure_decoding(subject, settings, updates(bar, "decoding"))
    _show(result, as_json, *bench_decode_tables(result))


@app.command("monitoring")
@exits_with_user_errors
def monitoring(
    config: Annotated[str, typer.Option(help="YAML file of the run.")],
    overrides: Overrides = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of rounds of `log.every` steps; medians are reported.")
    ] = 20,
    as_json: AsJson = False,
) -> None:
    """Measure how much longer a step takes with logs and callbacks than without.

    Start it like training: under torchrun or deepspeed with all ranks.
    """
    from mtp_dist.verify.startup import check_startup

    job = check_startup(load_config(config, overrides or []), log_level=logging.WARNING)
    silence_import_warnings()
    from mtp_dist.bench.monitoring import measure_monitoring

    _measure(
        job, lambda topology: measure_monitoring(job.config, job.sources, topology, rounds), as_json, monitoring_table
    )


@app.command("plan")
@exits_with_user_errors
def plan(
    only: Annotated[str | None, typer.Option(help="memory or times; by default both.")] = None, as_json: AsJson = False
) -> None:
    """Measure memory and processor time of training steps for small configurations, compared with the planner's.

    Starts up to four processes on the CPU.
    """
    from mtp_dist.bench.plan import QUANTITIES, measure_plans

    if only is not None and only not in QUANTITIES:
        raise LaunchError(f"--only = '{only}' is unknown: choose {' or '.join(QUANTITIES)}")
    result = measure_plans([quantity for quantity in QUANTITIES if only in (None, quantity)], bench_progress)
    _show(result, as_json, *bench_plan_tables(result))


def _measure(
    job: "CheckedJob",
    measure: Callable[["Topology"], dict[str, Any]],
    as_json: bool,
    table: Callable[[dict[str, Any]], RenderableType],
) -> None:
    """Measure on all ranks and print the result on rank 0."""
    from mtp_dist.distributed.topology import close_topology, initialize_topology

    topology = initialize_topology(job.config, job.device)
    result = measure(topology)
    close_topology()
    if topology.rank == 0:
        _show(result, as_json, table(result))


def _show(result: dict[str, Any], as_json: bool, *tables: RenderableType) -> None:
    """Print a measurement as tables, or as JSON with its machine, time and commit."""
    show_result({"measured": provenance(), **result}, as_json, *tables)
