"""The `mtp-dist` command: one module per group of subcommands.

Subcommands import what they run when they run: `mtp-dist --help` takes half a second of processor time at most.
"""

import logging
from typing import Annotated

import typer

from mtp_dist.cli import analyze, bench, convert, data, evaluate, experiment, generate, plan, train
from mtp_dist.monitoring.logs import configure_logging

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback(help="Pretrain and use language models that predict several tokens at once.")
def _options(local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0) -> None:
    """Accept the --local_rank that the deepspeed launcher passes to every rank; the environment contains it too."""
    # Standard output is for the command's result.
    configure_logging(0, logging.WARNING)


app.add_typer(analyze.app, name="analyze")
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="evaluate")
app.command("launch", context_settings={"ignore_unknown_options": True})(train.launch)
app.command("selfcheck")(train.selfcheck)
app.command("plan")(plan.plan)
app.command("prepare")(data.prepare)
app.command("inspect")(data.inspect)
app.command("export")(convert.export)
app.command("import")(convert.import_)
app.command("generate")(generate.generate)
app.command("report")(train.report)
app.command("experiment")(experiment.experiment)


def main() -> None:
    app()
