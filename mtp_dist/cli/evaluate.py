"""`mtp-dist evaluate`."""

import typer

from mtp_dist.cli.evaluate_code import code_command
from mtp_dist.cli.evaluate_lm import lm_eval
from mtp_dist.cli.evaluate_synthetic import synthetic

app = typer.Typer(no_args_is_help=True, help="Evaluate a trained model.")

app.command("lm-eval")(lm_eval)
app.command("humaneval", help="Measure pass@k on HumanEval: 164 functions in Python.")(code_command("humaneval"))
app.command("mbpp", help="Measure pass@k on MBPP: 500 functions in Python.")(code_command("mbpp"))
app.command("apps", help="Measure pass@k on the introductory problems of APPS.")(code_command("apps"))
app.command("synthetic")(synthetic)
