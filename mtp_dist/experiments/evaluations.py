"""The functions that measure a finished run, by the name that an experiment's YAML file gives them.

Each gets the run's folder and the file's `evaluation.options` as keywords and returns metrics by name: numbers, or None
for what the run does not have. To add one, write the function and enter it in EVALUATIONS.
"""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from mtp_dist.config.base import PositiveInt, Section
from mtp_dist.config.loader import synthetic_options
from mtp_dist.config.messages import describe_errors
from mtp_dist.distributed.processes import end_with_parent
from mtp_dist.errors import ConfigError, DataError, exits_with_user_errors
from mtp_dist.fs import atomic_write_text

EXECUTES_CODE = "code"
"""The function that executes what models write, which the user must permit."""

Metrics = Mapping[str, float | None]


def validation(run: Path) -> Metrics:
    """Return what the run's last validation measured: the first set's losses, accuracies and accepted drafts.

    `loss`, `accuracy` and `bits_per_byte` are head 1's; `loss/head_2` and so on belong to every head.
    """
    summary = _summary(run)
    first = summary["validation"][0]
    metrics: dict[str, float | None] = {name: first["heads"][0][name] for name in ("loss", "accuracy", "bits_per_byte")}
    for head in first["heads"]:
        metrics |= {f"{name}/head_{head['head']}": head[name] for name in ("loss", "accuracy", "bits_per_byte")}
    acceptance = {name: value for name, value in first.items() if name.startswith(("draft_", "expected_"))}
    return metrics | acceptance | {"tokens_per_second": summary["tokens_per_second"]}


def _summary(run: Path) -> Any:
    """Return what the run summarized at its end. Raise DataError if it has no validation."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if not summary["validation"]:
        raise DataError(f"{run} has no validation: the experiment's base needs data.validation")
    return summary


def code(
    run: Path,
    benchmark: Literal["humaneval", "mbpp", "apps"],
    samples: PositiveInt = 20,
    temperatures: Sequence[float] = (0.2, 0.8),
    max_new_tokens: PositiveInt = 512,
) -> Metrics:
    """Return pass@1, pass@10 and pass@100 of `mtp-dist evaluate humaneval`, `mbpp` or `apps`, in percent.

    Each is that of its best temperature. samples: completions per problem and temperature.
    """
    options = {
        "model": run,
        "samples": run / f"{benchmark}-samples.jsonl",
        "samples-per-problem": samples,
        "temperatures": ",".join(map(str, temperatures)),
        "max-new-tokens": max_new_tokens,
    }
    result = _run_command("evaluate", benchmark, "--allow-code-execution", **options)
    return {f"pass@{k}": 100 * best["value"] for k, best in result["oracle"].items()}


def decoding(
    run: Path, prompts: PositiveInt = 32, prompt_tokens: PositiveInt = 32, new_tokens: PositiveInt = 64
) -> Metrics:
    """Return what `validation` returns, and what greedy decoding accepts of the drafts of all heads.

    `mtp-dist bench decode` measures the latter on texts of the standard library: `tokens_per_forward`, and
    `acceptance/2` and so on, the accepted fraction at each distance of the drafts whose predecessors were accepted.
    """
    options = {"model": run, "batch": prompts, "prompt-tokens": prompt_tokens, "new-tokens": new_tokens, "rounds": 1}
    return {**validation(run), **_accepted(_run_command("bench", "decode", **options))}


def _accepted(result: Any) -> Metrics:
    """Return what decoding with the drafts of all heads accepts, at the largest batch that was measured."""
    *_, row = [row for row in result["rows"] if row["variant"] == f"k = {result['model']['heads']}"]
    acceptance = {f"acceptance/{distance}": fraction for distance, fraction in row["acceptance"].items()}
    return {"tokens_per_forward": row["tokens_per_forward"], **acceptance}


def adaptation(
    run: Path,
    top_k: PositiveInt = 100,
    tokens: PositiveInt = 4096,
    prompts: PositiveInt = 32,
    new_tokens: PositiveInt = 64,
) -> Metrics:
    """Return how well a model predicts the next and the second token, and how fast its heads decode.

    `top1`, `top5` and `loss` of the held-out files of Python's standard library: `/next` is head 1's; `/second` is that
    of the head for this distance or, with one head, `/marginal`: that of the sum over the `top_k` likeliest tokens.
    Heads that read the token before have no `/second`. `tokens_per_forward` and `acceptance/2` and so on are those of
    the drafts of all heads, `speed_up` that of the fastest number of heads, or no heads, for one text at a time.

    tokens: approximate number of positions to predict from. prompts, new_tokens: number of generated texts and tokens
    of each.
    """
    settings = {"data": "python-stdlib", "distance": 2, "top-k": top_k, "tokens": tokens}
    rows = _run_command("analyze", "marginalize", model=run, **settings)["rows"]
    found = {row["prediction"]: row for row in rows}
    has_heads = len(_summary(run)["validation"][0]["heads"]) > 1
    predictions = {"next": "next token", "second": "head" if has_heads else "marginal", "marginal": "marginal"}
    metrics: dict[str, float | None] = {
        f"{metric}/{name}": found.get(prediction, {}).get(key)
        for name, prediction in predictions.items()
        for metric, key in (("top1", "top1"), ("top5", "top5"), ("loss", "cross_entropy"))
    }
    if not has_heads:
        return metrics | {"tokens_per_forward": 1.0, "speed_up": 1.0}
    options = {"batch": f"1,{prompts}", "prompt-tokens": 32, "new-tokens": new_tokens, "rounds": 3}
    decoded = _run_command("bench", "decode", model=run, **options)
    alone = [row for row in decoded["rows"] if row["batch"] == 1 and "tokens_per_forward" in row]
    return {**metrics, **_accepted(decoded), "speed_up": max(row["speed_up"] for row in alone)}


def _run_command(*command: str, **options: object) -> Any:
    """Return the result of a command of mtp-dist that prints JSON. Exit with its status if it fails."""
    arguments = [*command, "--json", *(f"--{name}={value}" for name, value in options.items())]
    finished = subprocess.run(
        [sys.executable, "-m", "mtp_dist.cli", *arguments], stdout=subprocess.PIPE, preexec_fn=end_with_parent
    )
    if finished.returncode:
        sys.exit(finished.returncode)  # the command has reported the error
    return json.loads(finished.stdout)


def synthetic(
    run: Path,
    task: str,
    options: Mapping[str, Any] | None = None,
    pools: Mapping[str, Sequence[str]] | None = None,
) -> Metrics:
    """Return head 1's accuracy on each group of answers of a synthetic task, such as `accuracy/path`, and its chance.

    task: such as `induction`. options: parameters of the held-out documents that differ from those of the training.
    pools: further groups by name, each with the groups whose answers it has.
    """
    from mtp_dist.evaluation.synthetic import evaluate_synthetic

    groups = evaluate_synthetic(run, task, options)["groups"]
    for name, members in (pools or {}).items():
        if unknown := [member for member in members if member not in groups]:
            raise ConfigError(
                f"evaluation.options.pools.{name}: '{unknown[0]}' is not a group of answers of '{task}': give some of "
                f"{', '.join(groups)}"
            )
        total = sum(groups[member]["total"] for member in members)
        groups[name] = {
            "accuracy": sum(groups[member]["correct"] for member in members) / total,
            "chance": sum(groups[member]["chance"] * groups[member]["total"] for member in members) / total,
        }
    return {f"{kind}/{name}": group[kind] for kind in ("accuracy", "chance") for name, group in groups.items()}


EVALUATIONS: dict[str, Callable[..., Metrics]] = {
    "adaptation": adaptation,
    "code": code,
    "decoding": decoding,
    "synthetic": synthetic,
    "validation": validation,
}
VALIDATION_METRICS = (
    *("loss", "accuracy", "bits_per_byte", "loss/head_*", "accuracy/head_*", "bits_per_byte/head_*"),
    *("draft_acceptance_rate_*", "expected_tokens_per_forward", "tokens_per_second"),
)
METRICS = {
    "adaptation": ("top1/*", "top5/*", "loss/*", "tokens_per_forward", "acceptance/*", "speed_up"),
    "code": ("pass@1", "pass@10", "pass@100"),
    "decoding": (*VALIDATION_METRICS, "tokens_per_forward", "acceptance/*"),
    "synthetic": ("accuracy/*", "chance/*"),
    "validation": VALIDATION_METRICS,
}
"""Patterns of each function's metrics, by which a wrong name is found before the trainings."""


def option_errors(function: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield one message per invalid option of a function, which would otherwise fail after the training."""
    _, *parameters = inspect.signature(EVALUATIONS[function]).parameters.values()
    types: dict[str, Any] = {
        each.name: (each.annotation, ... if each.default is each.empty else each.default) for each in parameters
    }
    model = pydantic.create_model(function, __base__=Section, **types)
    try:
        model.model_validate(options)
        if function == "synthetic":
            _check_task(options["task"], options.get("options") or {})
    except pydantic.ValidationError as error:
        yield from (f"evaluation.options.{message}" for message in describe_errors(error, model))
    except ConfigError as error:
        yield from str(error).splitlines()


def _check_task(name: str, parameters: Mapping[str, Any]) -> None:
    from mtp_dist.data.synthetic.tasks import task_kind, task_parameters

    kind = task_kind(name, f"evaluation.options.task = '{name}'")
    key = "evaluation.options.options."
    task_parameters(kind, synthetic_options(parameters, key), key)


@exits_with_user_errors
def evaluate(function: str, options: Mapping[str, Any], run: Path, output: Path) -> None:
    """Evaluate a run and write the metrics with the function's name and options, which `measured` compares."""
    metrics = EVALUATIONS[function](run, **options)
    record = {"function": function, "options": options, "metrics": dict(metrics)}
    atomic_write_text(output, json.dumps(record, indent=2) + "\n")


def measured(function: str, options: Mapping[str, Any], output: Path) -> Metrics | None:
    """Return the metrics of an earlier evaluation, or None if there is none with this function and these options."""
    if not output.exists():
        return None
    record = json.loads(output.read_text(encoding="utf-8"))
    return record["metrics"] if (record["function"], record["options"]) == (function, options) else None


if __name__ == "__main__":
    _, name, keywords, folder, file = sys.argv
    evaluate(name, json.loads(keywords), Path(folder), Path(file))
