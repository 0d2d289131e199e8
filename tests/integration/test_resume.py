"""The real program, killed in the middle: the same command resumes it and ends as if nothing had happened."""

from pathlib import Path

import pytest

from mtp_dist.checkpoint.find import candidates, latest_name
from mtp_dist.checkpoint.manifest import check_fully
from tests.integration import jobs
from tests.integration.forks import Program
from tests.unit.checkpoint.folders import flip

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return jobs.write_config(folder, train={"steps": STEPS}, checkpoint={"every": 2}, log={"tensorboard": False})


def train(config: Path, output_dir: Path, *overrides: str) -> Program:
    arguments = ["--config", str(config), "parallel.pipeline=2", f"run.output_dir={output_dir}", *overrides]
    return jobs.forked(jobs.PRETRAIN, *arguments, processes=2)


def test_killed_run_resumes_from_an_older_checkpoint_if_the_newest_is_damaged(config: Path, folder: Path) -> None:
    complete, out = folder / "complete", folder / "out"
    assert jobs.run(train(config, complete)).status == 0
    with jobs.started(train(config, out), folder) as job:
        job.wait_until(lambda: latest_name(out / "checkpoints") == "step_00000004")
        job.rank(1).kill()
        assert job.wait() != 0
    checkpoints = out / "checkpoints"
    damaged, older = candidates(checkpoints)[:2]
    flip(damaged / "optimizer-00002-of-00002.safetensors", -1)
    result = jobs.run(train(config, out))
    assert result.status == 0, result.output
    assert f"Resuming from step {int(older.name[5:])} ({older})" in result.output
    [warning] = [line for line in result.output.splitlines() if line.endswith(f": trying {older}")]
    assert warning.startswith(f"warning: {damaged} is ")
    assert "optimizer-00002-of-00002.safetensors has the SHA-256 " in warning
    assert jobs.learned(out) == jobs.learned(complete)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest", *(f"step_{step:08d}" for step in range(2, STEPS + 1, 2))]
    for checkpoint in candidates(checkpoints):
        check_fully(checkpoint)

    again = jobs.run(train(config, out))
    assert again.status == 0 and f"has already reached step {STEPS}/{STEPS}; nothing to do" in again.output
    assert jobs.learned(out) == jobs.learned(complete), "nothing was touched"


def test_another_kind_of_head_is_refused(config: Path, folder: Path) -> None:
    out = folder / "refused"
    assert jobs.run(train(config, out)).status == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = jobs.run(train(config, out, "heads.kind=causal"))
    assert result.status == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith("error: heads.kind is 'causal', ") and "checkpoint.allow_changes" in errors[0]
    assert "Traceback" not in result.output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
