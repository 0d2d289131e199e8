"""The real program, killed in the middle: the same command resumes it and ends as if nothing had happened."""

from pathlib import Path

import pytest

from mtp_dist.checkpoint.find import candidates, latest_name
from mtp_dist.checkpoint.manifest import check_fully
from tests.integration import jobs
from tests.unit.checkpoint.folders import flip

STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections = {"train": {"steps": STEPS}, "checkpoint": {"every": 2}, "log": {"tensorboard": False}}
    return jobs.write_config(tmp_path_factory.mktemp("resume"), **sections)


def train(config: Path, output_dir: Path, *overrides: str) -> jobs.Program:
    arguments = ["--config", str(config), "parallel.pipeline=2", f"run.output_dir={output_dir}", *overrides]
    return jobs.forked(jobs.PRETRAIN, *arguments, processes=2)


@pytest.fixture(scope="module")
def complete(config: Path) -> Path:
    """The folder of a run that was not interrupted."""
    jobs.run(train(config, config.parent / "complete"), status=0)
    return config.parent / "complete"


def test_killed_run_resumes_from_an_older_checkpoint_if_the_newest_is_damaged(config: Path, complete: Path) -> None:
    out = config.parent / "out"
    checkpoints = out / "checkpoints"
    with jobs.started(train(config, out), config.parent) as job:
        job.wait_until(lambda: latest_name(checkpoints) == "step_00000004")
        job.rank(1).kill()
        assert job.wait() != 0
    damaged, older = candidates(checkpoints)[:2]
    flip(damaged / "optimizer-00002-of-00002.safetensors", -1)
    result = jobs.run(train(config, out), status=0)
    assert f"Resuming from step {int(older.name[5:])} ({older})" in result.output
    [warning] = [line for line in result.output.splitlines() if line.endswith(f": trying {older}")]
    assert warning.startswith(f"warning: {damaged} is ")
    assert "optimizer-00002-of-00002.safetensors has the SHA-256 " in warning
    assert jobs.learned(out) == jobs.learned(complete)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest", *(f"step_{step:08d}" for step in range(2, STEPS + 1, 2))]
    for checkpoint in candidates(checkpoints):
        check_fully(checkpoint)

    again = jobs.run(train(config, out), status=0)
    assert f"has already reached step {STEPS}/{STEPS}; nothing to do" in again.output
    assert jobs.learned(out) == jobs.learned(complete), "nothing was touched"


def test_another_kind_of_head_is_refused(config: Path, complete: Path) -> None:
    before = {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()}
    result = jobs.run(train(config, complete, "heads.kind=causal"), status=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith("error: heads.kind is 'causal', ") and "checkpoint.allow_changes" in errors[0]
    assert "Traceback" not in result.output
    assert {path: path.read_bytes() for path in complete.rglob("*") if path.is_file()} == before
