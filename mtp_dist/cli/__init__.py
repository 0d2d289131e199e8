"""The `mtp-dist` command."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mtp_dist.cli.bench import bench
from mtp_dist.config import load_config
from mtp_dist.config.schema import MAX_TEXT_LOSS
from mtp_dist.data.sources.work_units import InvalidUtf8
from mtp_dist.errors import ConfigError, UserError
from mtp_dist.monitoring.output import silence_import_warnings
from mtp_dist.pretrain import exit_with_error

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback(help="Pretrain and use language models that predict several tokens at once.")
def _options(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0) -> None:
    """The deepspeed launcher passes --local_rank to every rank; the environment says the same."""


app.add_typer(bench, name="bench")


@app.command("launch", context_settings={"ignore_unknown_options": True})
def launch_command(
    arguments: Annotated[list[str], typer.Argument(metavar="--config FILE [section.key=value]...")],
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes; one per GPU of this machine, or one without a GPU")
    ] = None,
) -> None:
    """Train on this machine. All else is as in launchers/pretrain.py: --config, --preflight, keys.

    Ctrl-C, SIGTERM and SIGUSR1 reach every rank: the run saves and ends with the exit status of the ranks.
    """
    from mtp_dist.cli.launch import launch

    if ranks is None:
        import torch

        ranks = max(1, torch.cuda.device_count())
    raise typer.Exit(launch(ranks, arguments))


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
    from mtp_dist.verify.startup import check_startup

    try:
        job = check_startup(load_config(config, overrides or []), needs_data=False)
    except UserError as error:
        exit_with_error(error)
    silence_import_warnings()
    from mtp_dist.distributed.topology import close_topology, initialize_topology
    from mtp_dist.verify.selfcheck import selfcheck as compare

    try:
        topology = initialize_topology(job.config, job.device)
    except UserError as error:
        exit_with_error(error)
    comparisons = compare(job.config, topology)
    close_topology()
    passed = all(comparison.passed for comparison in comparisons)
    layout = f"tensor {topology.tp_size} x pipeline {topology.pp_size} x data {topology.dp_size}"
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


@app.command()
def prepare(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...")],
    to: Annotated[str, typer.Option(help="path of the corpus without .bin, .idx and .json")],
    tokenizer: Annotated[str, typer.Option(help="as in data.tokenizer")],
    workers: Annotated[int | None, typer.Option(min=1, help="processes; as many as there are cores")] = None,
    field: Annotated[str, typer.Option(help="of JSON, CSV, Parquet and datasets: which one is the text")] = "text",
    glob: Annotated[str | None, typer.Option(help="which files of a folder, such as '**/*.py'")] = None,
    subset: Annotated[str | None, typer.Option(help="of a dataset that has several")] = None,
    split: Annotated[str | None, typer.Option(help="of a dataset; of files: all, train or validation")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="read a dataset while it downloads")] = False,
    invalid_utf8: Annotated[InvalidUtf8, typer.Option(help="what to do about it")] = "error",
    max_text_loss: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="share of the text, except whitespace, that may be lost by encoding and decoding"
        ),
    ] = MAX_TEXT_LOSS,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of sentences")] = False,
) -> None:
    """Make text a corpus of tokens on disk, in Megatron-core's format.

    INPUT is a folder (with --glob), a file of text or code, JSON lines, JSON, CSV or Parquet, python-stdlib, or a
    Hugging Face dataset. What was killed goes on with the same command.
    """
    from mtp_dist.cli.data_tables import PreparationProgress, describe
    from mtp_dist.data.prepare.prepare import Request
    from mtp_dist.data.prepare.prepare import prepare as make
    from mtp_dist.data.sources.text_sources import InputOptions

    options = InputOptions(field=field, glob=glob, subset=subset, split=split, streaming=streaming)
    workers = workers or len(os.sched_getaffinity(0))
    request = Request(tuple(inputs), Path(to), tokenizer, options, invalid_utf8, workers, max_text_loss=max_text_loss)
    try:
        with PreparationProgress(Console(stderr=True)) as progress:
            prepared = make(request, progress)
    except UserError as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print("stopped: the same command continues from the finished parts", file=sys.stderr, flush=True)
        raise typer.Exit(130) from None
    print(json.dumps(prepared.as_json()) if as_json else describe(request.prefix, prepared), flush=True)


def _bar() -> Progress:
    """For people; a file or a pipe gets none, not even its empty line."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _show_checkpoints(folder: Path, as_json: bool) -> bool:
    """Whether the folder is a checkpoint or has some, which are shown then."""
    from mtp_dist.checkpoint import inspection
    from mtp_dist.checkpoint.find import is_checkpoint

    console = Console(width=None if os.isatty(1) else 120)
    if not is_checkpoint(folder):
        lines = inspection.list_checkpoints(folder)
        if as_json and lines:
            print(json.dumps([asdict(line) for line in lines]), flush=True)
        elif lines:
            inspection.print_list(lines, console)
        if damage := [line.damage for line in lines if line.damage]:
            exit_with_error(ConfigError("\n".join(damage)))
        return bool(lines)
    try:
        with _bar() as progress:
            task = progress.add_task("reading")
            report = inspection.inspect_checkpoint(
                folder, lambda done, total: progress.update(task, completed=done, total=total)
            )
    except UserError as error:
        exit_with_error(error)
    if as_json:
        print(json.dumps(asdict(report)), flush=True)
    else:
        inspection.print_checkpoint(report, console)
    return True


@app.command()
def inspect(
    corpus: Annotated[
        str,
        typer.Argument(metavar="DATA", help="a prepared corpus: its path without .bin; or a checkpoint, or several"),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="where the corpus does not name it: as in data.tokenizer")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="prediction heads whose targets are shown")] = 4,
    samples: Annotated[int, typer.Option(min=0, help="samples shown")] = 1,
    positions: Annotated[int, typer.Option(min=1, help="positions of each that are shown")] = 12,
    frequent: Annotated[int, typer.Option(min=0, help="most frequent tokens shown")] = 10,
    verify: Annotated[bool, typer.Option("--verify", help="compare the tokens with their checksum")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Show what is in a corpus, and what each head is asked for; or what is in a checkpoint, and whether it is whole.

    A folder of checkpoints is listed. The options but --json are for a corpus. Exit status 2 where something is
    damaged.
    """
    from mtp_dist.cli.data_tables import print_report
    from mtp_dist.data.corpus import open_corpus, prefix_of
    from mtp_dist.data.prepare.inspection import inspect_corpus
    from mtp_dist.data.tokenizer import build_tokenizer

    if Path(corpus).is_dir() and _show_checkpoints(Path(corpus), as_json):
        return
    try:
        opened = open_corpus(prefix_of(corpus) or corpus, "DATA")
        named = tokenizer or (opened.description.tokenizer.name if opened.description else None)
        if named is None:
            raise ConfigError(f"DATA = '{corpus}' does not name its tokenizer: give it with --tokenizer")
        if verify:
            opened.verify()
        tokenizer_of_corpus = build_tokenizer(named, "--tokenizer" if tokenizer else f"the tokenizer of {corpus}")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("tokens", total=len(opened.tokens))
            report = inspect_corpus(
                opened,
                tokenizer_of_corpus,
                heads,
                positions,
                samples,
                frequent,
                on_progress=lambda done: progress.update(task, completed=done),
            )
    except UserError as error:
        exit_with_error(error)
    if as_json:
        print(json.dumps(asdict(report)), flush=True)
    else:
        print_report(report, Console(width=None if os.isatty(1) else 120))


@app.command("export")
def export_command(
    checkpoint: Annotated[str, typer.Option(help="its folder, or one of several, of which the newest is taken")],
    to: Annotated[str, typer.Option(help="the new folder")],
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; as in train.precision when absent")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a sentence")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder: trunk and head 1 as a Llama, the other heads beside it."""
    silence_import_warnings()
    from mtp_dist.convert.to_huggingface import export_checkpoint

    try:
        with _bar() as progress:
            checked, written = progress.add_task("verifying"), progress.add_task("writing")
            exported = export_checkpoint(
                Path(checkpoint).expanduser(),
                Path(to).expanduser(),
                dtype,
                lambda done, total: progress.update(written, completed=done, total=total),
                lambda done, total: progress.update(checked, completed=done, total=total),
            )
    except UserError as error:
        exit_with_error(error)
    print(json.dumps(asdict(exported)) if as_json else exported.describe(), flush=True)


@app.command("import")
def import_command(
    source: Annotated[str, typer.Option("--from", help="Hugging Face folder with a Llama, or with an export of ours")],
    to: Annotated[str, typer.Option(help="the new checkpoint folder, for checkpoint.resume")],
    config: Annotated[str | None, typer.Option(help="YAML file of the run that will train it")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="instead of heads.count")] = None,
    copy_heads: Annotated[bool, typer.Option("--copy-heads", help="new heads start as copies of head 1")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
) -> None:
    """Make a Hugging Face folder a checkpoint to train from, whose head 1 computes what that model computes.

    The layers that head 1 has of its own are the last ones of that model. The other heads are those of an export of
    ours, or new.
    """
    silence_import_warnings()
    from mtp_dist.convert.from_huggingface import import_llama
    from mtp_dist.convert.import_config import ImportRequest

    source_folder, target = Path(source).expanduser(), Path(to).expanduser()
    request = ImportRequest(source_folder, target, config, overrides or [], heads, copy_heads)
    try:
        with _bar() as progress:
            task = progress.add_task("weights")
            imported = import_llama(request, lambda done, total: progress.update(task, completed=done, total=total))
    except UserError as error:
        exit_with_error(error)
    print(imported.describe(), flush=True)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of runs, such as runs/demo")],
    to: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="where to write; a folder `report` in the first run's")
    ] = None,
) -> None:
    """Write one HTML page with the curves, events and configuration of a run, or of several beside one another."""
    from mtp_dist.monitoring.report.page import write_report

    folders = [Path(run).expanduser() for run in runs]
    try:
        page = write_report(folders, Path(to).expanduser() if to else folders[0] / "report")
    except UserError as error:
        exit_with_error(error)
    print(page, flush=True)


def main() -> None:
    app()
