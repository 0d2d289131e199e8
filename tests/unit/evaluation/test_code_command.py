"""`mtp-dist evaluate humaneval`: what it prints, and its refusals."""

import json
from pathlib import Path

import pytest

from mtp_dist.cli.evaluate_code import code_command
from mtp_dist.errors import LaunchError
from mtp_dist.evaluation.sandbox import Sandbox
from tests.unit.convert.folders import write_model

PROBLEM = {
    "task_id": "T/0",
    "prompt": "def same(x):\n    return x",
    "test": "def check(f):\n    assert f(3) == 3",
    "entry_point": "same",
}
evaluate = code_command("humaneval")


@pytest.fixture
def options(tmp_path):
    """Return options that name existing files: of two samples one is right."""
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM))
    lines = [json.dumps({"task_id": "T/0", "completion": completion}) for completion in ("", " + 1")]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("problems", "samples")}
    return {**files, "allow_code_execution": True, "workers": 1}


@pytest.fixture
def needs_sandbox():
    try:
        Sandbox().check()
    except LaunchError as error:
        pytest.skip(str(error))


def test_existing_samples(needs_sandbox, options, capsys):
    evaluate(**options, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["outcomes"] == {"passed": 1, "AssertionError": 1} and result["sandbox"]
    assert result["temperatures"][0]["pass_at"] == {"1": 0.5} and result["oracle"]["1"]["value"] == 0.5
    evaluate(**options)
    assert "50.0%" in capsys.readouterr().out


def test_model(needs_sandbox, options, tmp_path, capsys, monkeypatch):
    write_model(tmp_path / "model", train={"sequence_length": 64})
    options |= {"model": str(tmp_path / "model"), "samples": str(tmp_path / "new.jsonl"), "max_new_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(Sandbox, "run", lambda sandbox, program: pytest.fail("code was executed"))
        evaluate(**options, temperatures="0", samples_per_problem=1, only_sample=True)
    assert f"mtp-dist evaluate humaneval --samples {tmp_path}/new.jsonl" in capsys.readouterr().out
    evaluate(**options, temperatures="0,1", samples_per_problem=2, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert [row["temperature"] for row in result["temperatures"]] == [0, 1]
    assert sum(result["outcomes"].values()) == 4 == len((tmp_path / "new.jsonl").read_text().splitlines())
    assert all(row["tokens_per_forward"] >= 1 for row in result["temperatures"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_code_execution": False}, "permit it with --allow-code-execution"),
        ({"allow_code_execution": False, "unsafe_no_sandbox": True}, "permit it with --allow-code-execution"),
        ({"samples": None}, "--model is required, or --samples"),
        ({"only_sample": True}, "--model is required, or --samples"),
        ({"model": "m", "temperatures": "warm"}, "--temperatures = 'warm' is not a list of numbers"),
        ({"model": "m", "temperatures": "0.5,-1"}, "--temperature = -1.0: use 0 for "),
        ({"model": "missing"}, "--model = 'missing' does not exist"),
        ({"model": ""}, "--model is empty: "),
        ({"problems": "missing.jsonl"}, "cannot read the problems in missing.jsonl"),
    ],
)
def test_refusals(options, monkeypatch, capsys, changes, message):
    monkeypatch.setattr(Sandbox, "check", lambda sandbox: None)
    monkeypatch.setattr(Sandbox, "run", lambda sandbox, program: pytest.fail("code was executed"))
    with pytest.raises(SystemExit) as exit_:
        evaluate(**options | changes)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_samples_of_other_problems_than_those_of_the_limit(options, monkeypatch, capsys):
    monkeypatch.setattr(Sandbox, "check", lambda sandbox: None)
    rows = [PROBLEM | {"task_id": "T/1"}, PROBLEM]
    Path(options["problems"]).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match="2"):
        evaluate(**options, limit=1)
    assert (
        capsys.readouterr().err
        == "error: --samples has no completion of the problems that --limit selects: give a larger limit\n"
    )


def test_no_namespaces(options, monkeypatch, capsys):
    """A machine without them refuses, unless the second flag permits the execution without a sandbox."""
    run = Sandbox._outcome

    def refuse(sandbox, result, token):
        return run(sandbox, {"refused": "unshare: Operation not permitted"} if sandbox.is_isolated else result, token)

    monkeypatch.setattr(Sandbox, "_outcome", refuse)
    with pytest.raises(SystemExit) as exit_:
        evaluate(**options)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and "unshare: Operation not permitted" in error and "--unsafe-no-sandbox" in error
    evaluate(**options, unsafe_no_sandbox=True, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["outcomes"] == {"passed": 1, "AssertionError": 1} and not result["sandbox"]
