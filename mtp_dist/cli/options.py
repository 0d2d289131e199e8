"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_dist.errors import ConfigError

ConfigFile = Annotated[str, typer.Option("--config", help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def model_folder(model: str) -> Path:
    """Return the path that --model names. Raise ConfigError if it is empty, which would be the current folder."""
    if not model:
        raise ConfigError("--model is empty: give the folder of a run, of a checkpoint or of an export")
    return Path(model).expanduser()
