"""`mtp-dist prepare`, and `inspect` of corpora and checkpoints."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mtp_dist.cli.options import AsJson
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.cli.tables import checkpoint_tables, checkpoints_table, show_result
from mtp_dist.config.schema import MAX_TEXT_LOSS
from mtp_dist.data.sources.work_units import InvalidUtf8
from mtp_dist.errors import CheckpointError, ConfigError, DataError, exits_with_user_errors


@exits_with_user_errors
def prepare(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...")],
    to: Annotated[str, typer.Option(help="Path of the corpus without .bin, .idx and .json.")],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer, given as in data.tokenizer.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; by default one per core.")] = None,
    field: Annotated[str, typer.Option(help="Field with the text, in JSON, CSV, Parquet and datasets.")] = "text",
    prompt_field: Annotated[
        str | None, typer.Option(help="Field with prompts, whose tokens no head learns to predict.")
    ] = None,
    completion_field: Annotated[str | None, typer.Option(help="Field with the completions of these prompts.")] = None,
    messages_field: Annotated[
        str | None,
        typer.Option(help="Field with messages, which the chat template writes; only the assistant's are learned."),
    ] = None,
    glob: Annotated[str | None, typer.Option(help="Files of a folder to read, such as '**/*.py'.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of a dataset that has several.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of a dataset; of files one of all, train and validation.")
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a dataset while it downloads.")] = False,
    invalid_utf8: Annotated[InvalidUtf8, typer.Option(help="What to do with documents that are not UTF-8.")] = "error",
    max_text_loss: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Fraction of the text, except whitespace, that encoding and decoding may lose."
        ),
    ] = MAX_TEXT_LOSS,
    as_json: AsJson = False,
) -> None:
    """Tokenize text into a corpus on disk, in Megatron-core's format.

    INPUT is a folder (with --glob), a file of text or code, JSON lines, JSON, CSV or Parquet, python-stdlib, or a
    Hugging Face dataset. The same command continues after it was interrupted.
    """
    from mtp_dist.cli.data_tables import PreparationProgress, describe
    from mtp_dist.data.chat_template import read_chat_template
    from mtp_dist.data.prepare.prepare import Request
    from mtp_dist.data.prepare.prepare import prepare as make
    from mtp_dist.data.sources.input import InputOptions

    if messages_field and (prompt_field or completion_field):
        raise ConfigError("--messages-field excludes --prompt-field and --completion-field: remove one or the others")
    if (prompt_field is None) != (completion_field is None):
        raise ConfigError("--prompt-field and --completion-field belong together: give both or neither")
    if (instead := messages_field or completion_field) and field != InputOptions.field:
        other = "--messages-field" if messages_field else "--completion-field"
        raise ConfigError(f"--field '{field}' has no effect with {other}: remove it")
    template = read_chat_template(tokenizer, "--tokenizer") if messages_field else None
    options = InputOptions(
        instead or field, glob, subset, split, streaming, prompt_field=prompt_field, chat_template=template
    )
    workers = workers or len(os.sched_getaffinity(0))
    request = Request(tuple(inputs), Path(to), tokenizer, options, invalid_utf8, workers, max_text_loss=max_text_loss)
    try:
        with PreparationProgress(Console(stderr=True)) as progress:
            prepared = make(request, progress)
    except KeyboardInterrupt:
        print("interrupted: run the same command to continue", file=sys.stderr, flush=True)
        raise typer.Exit(130) from None
    print(json.dumps(prepared.as_json()) if as_json else describe(request.prefix, prepared), flush=True)


@exits_with_user_errors
def inspect(
    corpus: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A corpus, by its path without .bin; a checkpoint; or a folder of checkpoints.",
        ),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of a corpus that does not name it, given as in data.tokenizer.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Number of prediction heads whose targets are shown.")] = 4,
    samples: Annotated[int, typer.Option(min=0, help="Number of samples shown.")] = 1,
    positions: Annotated[int, typer.Option(min=1, help="Number of positions shown per sample.")] = 12,
    frequent: Annotated[int, typer.Option(min=0, help="Number of most frequent tokens shown.")] = 10,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the tokens with their checksum.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the contents of a corpus and the targets of each head, or the contents and integrity of a checkpoint.

    A folder of checkpoints is listed. All options except --json apply to a corpus. The exit status is 2 if something
    is damaged.
    """
    from mtp_dist.cli.data_tables import corpus_tables
    from mtp_dist.data.build_tokenizer import build_tokenizer
    from mtp_dist.data.corpus import corpus_prefix, open_corpus
    from mtp_dist.data.prepare.inspection import inspect_corpus

    if Path(corpus).is_dir() and _inspect_checkpoints(Path(corpus), as_json):
        return
    opened = open_corpus(corpus_prefix(corpus) or corpus, "DATA")
    name = tokenizer or (opened.description.tokenizer.name if opened.description else None)
    if name is None:
        raise DataError(f"DATA = '{corpus}' does not name its tokenizer: give it with --tokenizer")
    if verify:
        opened.verify()
    corpus_tokenizer = build_tokenizer(name, "--tokenizer" if tokenizer else f"the tokenizer of {corpus}")
    with progress_bar() as bar:
        update, total = updates(bar, "tokens"), len(opened.tokens)
        report = inspect_corpus(
            opened, corpus_tokenizer, heads, positions, samples, frequent, lambda done: update(done, total)
        )
    show_result(asdict(report), as_json, *corpus_tables(report))


def _inspect_checkpoints(folder: Path, as_json: bool) -> bool:
    """Show the checkpoint, or the checkpoints in the folder. Return whether there are any."""
    from mtp_dist.checkpoint.find import is_checkpoint
    from mtp_dist.checkpoint.inspection import inspect_checkpoint, list_checkpoints

    if is_checkpoint(folder):
        with progress_bar() as bar:
            report = inspect_checkpoint(folder, updates(bar, "reading"))
        show_result(asdict(report), as_json, *checkpoint_tables(report))
        return True
    lines = list_checkpoints(folder)
    if lines:
        show_result([asdict(line) for line in lines], as_json, checkpoints_table(lines))
    if damage := [line.damage for line in lines if line.damage]:
        raise CheckpointError("\n".join(damage))
    return bool(lines)
