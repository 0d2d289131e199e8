"""`mtp-dist export` and `import`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mtp_dist.cli.options import AsJson, Overrides
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.errors import exits_with_user_errors
from mtp_dist.monitoring.output import silence_import_warnings


@exits_with_user_errors
def export(
    checkpoint: Annotated[
        str, typer.Option(help="Folder of a checkpoint, or of several or of a run, of which the newest is exported.")
    ],
    to: Annotated[str, typer.Option(help="New folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; by default train.precision.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="[plain|transformers]",
            help="plain: for all programs; transformers: with code that drafts with the other heads.",
        ),
    ] = "plain",
    adapter: Annotated[
        str | None,
        typer.Option(help="Also write the low-rank adapters alone as this new folder, for peft on the base model."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder: trunk and head 1 as one model, the other heads next to it."""
    silence_import_warnings()
    from mtp_dist.convert.to_huggingface import export_checkpoint

    with progress_bar() as bar:
        verifying, writing = updates(bar, "verifying"), updates(bar, "writing")
        exported = export_checkpoint(
            Path(checkpoint).expanduser(),
            Path(to).expanduser(),
            dtype,
            writing,
            verifying,
            engine,
            Path(adapter).expanduser() if adapter else None,
        )
    print(json.dumps(asdict(exported)) if as_json else exported.describe(), flush=True)


@exits_with_user_errors
def import_(
    source: Annotated[
        str, typer.Option("--from", help="Hugging Face folder with a model, or with an export of mtp-dist.")
    ],
    to: Annotated[str, typer.Option(help="New checkpoint folder to write, for checkpoint.resume.")],
    config: Annotated[str | None, typer.Option(help="YAML file of the run that will train the model.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Number of heads; overrides heads.count.")] = None,
    copy_heads: Annotated[bool, typer.Option("--copy-heads", help="Initialize new heads as copies of head 1.")] = False,
    overrides: Overrides = None,
) -> None:
    """Convert a Hugging Face folder to a checkpoint to train from, whose head 1 computes what the model computes.

    The layers that head 1 does not share with the other heads are the last ones of the model. The other heads come
    from an export of mtp-dist or are new.
    """
    silence_import_warnings()
    from mtp_dist.convert.from_huggingface import import_model
    from mtp_dist.convert.import_config import ImportRequest

    request = ImportRequest(
        Path(source).expanduser(), Path(to).expanduser(), config, overrides or [], heads, copy_heads
    )
    with progress_bar() as bar:
        imported = import_model(request, updates(bar, "weights"))
    print(imported.describe(), flush=True)
