"""`mtp-dist selfcheck` under the launchers: it passes if the model is right and fails if it is not."""

import json
from pathlib import Path

import pytest

from tests.integration import jobs

COMMANDS = {
    "torchrun": lambda *arguments: jobs.torchrun("-m", "mtp_dist.cli", *arguments),
    "deepspeed": lambda *arguments: jobs.deepspeed("--module", "mtp_dist.cli", *arguments),
}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A configuration whose data does not exist: the self-check needs none."""
    config = jobs.write_config(tmp_path, data={"train": [{"path": "/not/here"}], "validation": []})
    return ["selfcheck", "--config", str(config), "parallel.tensor=2", "parallel.sequence=true"]


@pytest.mark.parametrize("launcher", COMMANDS)
def test_right_model_passes(tmp_path: Path, arguments: list[str], launcher: str) -> None:
    result = jobs.run(COMMANDS[launcher](*arguments, "--json", "train.precision=bf16"))
    assert result.status == 0, result.output
    report = json.loads(result.stdout)  # nothing else is on standard output
    assert report["passed"] is True
    assert report["layout"] == "tensor 2 x pipeline 1 x data 1"
    quantities = {"losses", "gradient norm", "gradients", "updated weights"}
    for precision in ("fp32", "bf16"):
        rows = [row for row in report["comparisons"] if row["precision"] == precision]
        assert {row["quantity"] for row in rows} == quantities and len(rows) == len(quantities)
        assert all(row["passed"] and 0 <= row["error"] <= row["tolerance"] < 0.2 for row in rows), rows
    assert not (tmp_path / "out").exists()


def test_norm_without_gradient_reduction_fails(arguments: list[str]) -> None:
    result = jobs.run(jobs.forked(jobs.FAULTY, "unreduced_norm", *arguments, processes=2))
    assert result.status == 1, result.output
    assert "FAILED" in result.stdout
    [gradients] = [line for line in result.stdout.splitlines() if "gradients" in line]
    assert "WRONG" in gradients and "norm" in gradients
    [losses] = [line for line in result.stdout.splitlines() if "losses" in line]
    assert "ok" in losses
