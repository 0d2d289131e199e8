"""`mtp-dist selfcheck` under the launchers: it passes where the model is right and fails where it is not."""

import json
from pathlib import Path

import pytest

from tests.integration import jobs

FAULTY_PROGRAM = str(Path(__file__).with_name("selfcheck_with_fault.py"))
COMMANDS = {
    "torchrun": lambda *arguments: jobs.torchrun("-m", "mtp_dist.cli", *arguments),
    "deepspeed": lambda *arguments: jobs.deepspeed("--module", "mtp_dist.cli", *arguments),
}
LAYOUT = ["parallel.tensor=2", "parallel.sequence=true"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """selfcheck needs no data, so what the configuration names need not be here."""
    config = jobs.write_config(tmp_path, data={"train": [{"path": "/not/here"}], "validation": []})
    return ["selfcheck", "--config", str(config), *LAYOUT]


@pytest.mark.parametrize("launcher", COMMANDS)
def test_passes(tmp_path: Path, arguments: list[str], launcher: str) -> None:
    result = jobs.run(COMMANDS[launcher](*arguments, "--json", "train.precision=bf16"))
    assert result.status == 0, result.output
    # A program reads it: nothing else on standard output.
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["layout"] == "tensor 2 x pipeline 1 x data 1"
    quantities = {"losses", "gradient norm", "gradients", "updated weights"}
    for precision in ("fp32", "bf16"):
        rows = [row for row in report["comparisons"] if row["precision"] == precision]
        assert {row["quantity"] for row in rows} == quantities and len(rows) == len(quantities)
        assert all(row["passed"] and 0 <= row["error"] <= row["tolerance"] < 0.2 for row in rows), rows
    assert not (tmp_path / "out").exists()


def test_finds_a_broken_norm(arguments: list[str]) -> None:
    result = jobs.run(jobs.forked(FAULTY_PROGRAM, *arguments, processes=2))
    assert result.status == 1, result.output
    assert "FAILED" in result.stdout
    [gradients] = [line for line in result.stdout.splitlines() if "gradients" in line]
    assert "WRONG" in gradients and "norm" in gradients
    [losses] = [line for line in result.stdout.splitlines() if "losses" in line]
    assert "ok" in losses
