"""`mtp-dist evaluate humaneval`, `mbpp` and `apps`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mtp_dist.cli.options import AsJson, model_folder
from mtp_dist.cli.progress import progress_bar, updates
from mtp_dist.cli.tables import fact_lines, show_result
from mtp_dist.errors import ConfigError, DataError, LaunchError, exits_with_user_errors
from mtp_dist.inference.request import check_heads, check_numbers

if TYPE_CHECKING:  # they import torch
    from mtp_dist.evaluation.code_samples import Sample, SamplingOptions
    from mtp_dist.evaluation.problems import Benchmark, Problem
    from mtp_dist.evaluation.sandbox import Sandbox

SPEED_PERIOD_S = 3600
"""A batch of long completions may take minutes."""

Model = Annotated[
    str | None,
    typer.Option(help="Folder of an export, of a checkpoint or of a run. Without it existing samples are evaluated."),
]
Samples = Annotated[
    str | None, typer.Option(metavar="FILE", help="JSONL file of the completions, which a repeated command continues.")
]
Problems = Annotated[
    str | None, typer.Option(metavar="FILE", help="Other problems: a JSONL file of HumanEval's format, or .jsonl.gz.")
]
Temperatures = Annotated[str, typer.Option(help="Temperatures, separated by commas.")]
SamplesPerProblem = Annotated[
    int, typer.Option("--samples-per-problem", min=1, help="Completions per problem and temperature.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest completion.")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Completions per batch; by default 8 on a CPU, 64 on a GPU."),
]
Heads = Annotated[
    int | None,
    typer.Option(metavar="K", help="Number of heads that predict. By default as many as are fastest."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Evaluate the first problems only.")]
Timeout = Annotated[float, typer.Option(min=0.1, max=3600, help="Processor time of a program, in seconds.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Programs that run at once; by default one per core.")]
Allow = Annotated[
    bool, typer.Option("--allow-code-execution", help="Execute the code that the model has written, in a sandbox.")
]
OnlySample = Annotated[bool, typer.Option("--only-sample", help="Write the completions and execute nothing.")]
Unsafe = Annotated[
    bool,
    typer.Option("--unsafe-no-sandbox", help="Execute it with your rights: only limits and a filter remain."),
]


def code_command(name: str) -> Callable[..., None]:
    """Return the command that evaluates a model on a benchmark."""

    @exits_with_user_errors
    def command(
        model: Model = None,
        samples: Samples = None,
        problems: Problems = None,
        temperatures: Temperatures = "0.5,0.6,0.7,0.8,0.9",
        samples_per_problem: SamplesPerProblem = 200,
        max_new_tokens: NewTokens = 1024,
        batch_size: BatchSize = None,
        speculative: Heads = None,
        limit: Limit = None,
        timeout: Timeout = 3.0,
        workers: Workers = None,
        allow_code_execution: Allow = False,
        unsafe_no_sandbox: Unsafe = False,
        only_sample: OnlySample = False,
        as_json: AsJson = False,
    ) -> None:
        if model is None and (only_sample or not samples):
            raise ConfigError("--model is required, or --samples with a file of existing completions to execute")
        if not allow_code_execution and not only_sample:
            raise LaunchError(
                f"{name} executes code that a model has written: permit it with --allow-code-execution. It runs in a "
                "sandbox, see docs/evaluation.md. --only-sample executes nothing"
            )
        from mtp_dist.evaluation.code_samples import SamplingOptions, read_samples
        from mtp_dist.evaluation.problems import BENCHMARKS, read_problems
        from mtp_dist.evaluation.sandbox import Sandbox

        sandbox = Sandbox(timeout, is_isolated=not unsafe_no_sandbox)
        if not only_sample:
            sandbox.check()
        benchmark = BENCHMARKS[name]
        available = read_problems(Path(problems).expanduser()) if problems else benchmark.load()
        file = Path(samples or f"{name}-samples.jsonl").expanduser()
        if model is not None:
            folder, chosen = model_folder(model), _temperatures(temperatures)
            for temperature in chosen:
                check_numbers(max_new_tokens, temperature, speculative)
            options = SamplingOptions(chosen, samples_per_problem, max_new_tokens, limit, batch_size, speculative)
            completions = _sample(folder, benchmark, available, options, file)
        else:
            completions = read_samples(file, available)
        if only_sample:
            show_result({"samples": str(file), "completions": len(completions)}, as_json, *_next_step(name, file))
            return
        result = {
            "benchmark": name,
            "model": model,
            "samples": str(file),
            "sandbox": sandbox.is_isolated,
            "timeout_s": timeout,
            **_execute(sandbox, available[:limit], completions, workers),
        }
        show_result(result, as_json, _table(result), *fact_lines(_facts(result)))

    return command


def _temperatures(text: str) -> list[float]:
    try:
        return list(dict.fromkeys(map(float, text.split(","))))
    except ValueError:
        raise ConfigError(
            f"--temperatures = {text!r} is not a list of numbers separated by commas, such as 0.2,0.8"
        ) from None


def _sample(
    folder: Path, benchmark: Benchmark, problems: list[Problem], options: SamplingOptions, file: Path
) -> list[Sample]:
    from transformers.utils import logging as transformers_logging

    from mtp_dist.evaluation.code_sampling import sample_missing
    from mtp_dist.inference.generator import Generator

    transformers_logging.set_verbosity_error()
    with progress_bar(SPEED_PERIOD_S) as bar:
        generator = Generator.open_on_device(
            folder, updates(bar, "verifying"), lambda found: check_heads(found.config, options.heads)
        )
        return sample_missing(generator, benchmark, problems, options, file, updates(bar, "sampling"))


def _execute(sandbox: Sandbox, problems: list[Problem], samples: list[Sample], workers: int | None) -> dict[str, Any]:
    from mtp_dist.evaluation.code_results import execute_samples, summarize
    from mtp_dist.provenance import provenance, usable_cores

    chosen = {problem.task_id for problem in problems}
    samples = [sample for sample in samples if sample.task_id in chosen]
    if not samples:
        raise DataError("--samples has no completion of the problems that --limit selects: give a larger limit")
    with progress_bar() as bar:
        outcomes = execute_samples(sandbox, problems, samples, workers or usable_cores(), updates(bar, "executing"))
    return {"measured": provenance(), **summarize(problems, samples, outcomes)}


def _next_step(name: str, file: Path) -> Iterator[Text]:
    command = f"mtp-dist evaluate {name} --samples {shlex.quote(str(file))} --allow-code-execution"
    return fact_lines({"Samples": str(file), "Execute them by": command})


def _table(result: dict[str, Any]) -> Table:
    names = list(result["oracle"])
    columns = ["temperature", "problems", "samples each", *(f"pass@{k}" for k in names), "tokens per pass"]
    title = f"{result['benchmark']}, {result['model'] or result['samples']}"
    table = Table(*columns, title=title)
    for row in result["temperatures"]:
        temperature, per_pass = ("" if row[key] is None else row[key] for key in ("temperature", "tokens_per_forward"))
        scores = [f"{row['pass_at'][k]:.1%}" if k in row["pass_at"] else "" for k in names]
        counts = [str(row["problems"]), str(row["samples_per_problem"])]
        table.add_row(str(temperature), *counts, *scores, f"{per_pass:.2f}" if per_pass else "")
    if len(result["temperatures"]) > 1:
        best = [f"{oracle['value']:.1%} at {oracle['temperature']}" for oracle in result["oracle"].values()]
        table.add_row("oracle", "", "", *best, "")
    return table


def _facts(result: dict[str, Any]) -> dict[str, str]:
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in result["outcomes"].items())
    facts = {"Samples": result["samples"], "Outcomes": outcomes}
    if too_long := result["prompts_too_long"]:
        facts["Too long"] = f"{too_long} prompts have as many tokens as the texts of the training, and no completions"
    return facts
