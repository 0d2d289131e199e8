"""`mtp-dist selfcheck` on two ranks: it passes if the model is right and fails if it is not."""

import json
import re
from functools import partial

import pytest

from tests.integration import jobs


@pytest.fixture
def arguments(tmp_path):
    """A configuration whose data does not exist: the self-check needs none."""
    config = jobs.write_config(tmp_path, data={"train": [{"path": "/not/here"}], "validation": []})
    return ["selfcheck", "--config", str(config), "parallel.tensor=2", "parallel.sequence=true"]


NEOX = ["model.normalization=layernorm", "model.linear_bias=true", "model.mlp=gelu", "model.parallel_residual=true"]


@pytest.mark.parametrize(
    ("launch", "blocks"),
    [(partial(jobs.torchrun, "-m"), []), (partial(jobs.forked, "-m", processes=2), NEOX)],
    ids=["llama", "neox"],
)
def test_right_model_passes(tmp_path, arguments, launch, blocks):
    result = jobs.run(launch("mtp_dist.cli", *arguments, *blocks, "--json", "train.precision=bf16"), status=0)
    report = json.loads(result.stdout)  # nothing else is on standard output
    assert report["passed"] is True and report["layout"] == "tensor 2 x pipeline 1 x data 1"
    quantities = {"losses", "gradient norm", "gradients", "updated weights"}
    for precision in ("fp32", "bf16"):
        rows = [row for row in report["comparisons"] if row["precision"] == precision]
        assert {row["quantity"] for row in rows} == quantities and len(rows) == len(quantities)
        assert all(row["passed"] and 0 <= row["error"] <= row["tolerance"] < 0.2 for row in rows), rows
    assert not (tmp_path / "out").exists()


def test_norm_without_gradient_reduction_fails(arguments):
    result = jobs.run(jobs.forked(jobs.FAULTY, "unreduced_norm", *arguments, processes=2), status=1)
    assert "FAILED" in result.stdout
    for quantity, verdict in (("gradients", "norm.*WRONG"), ("losses", "ok")):
        [line] = [line for line in result.stdout.splitlines() if quantity in line]
        assert re.search(verdict, line), line
