"""`mtp-dist evaluate`: what a trained model can do."""

import typer

from mtp_dist.cli.evaluate_lm import lm_eval

app = typer.Typer(no_args_is_help=True, help="Evaluate a trained model.")


@app.callback()
def _group() -> None:
    """Evaluate a trained model."""


app.command("lm-eval")(lm_eval)
