"""Options that several commands have."""

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Option("--config", help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
