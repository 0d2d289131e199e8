"""The real program, killed in the middle: the same command goes on and ends as if nothing had happened."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtp_dist.checkpoint.find import candidates, latest_name
from mtp_dist.checkpoint.manifest import check_fully
from tests.integration import jobs
from tests.integration.forks import Program
from tests.unit.checkpoint.folders import flip

STEPS = 12
ARGUMENTS = [f"train.steps={STEPS}", "checkpoint.every=2", "parallel.pipeline=2"]


def arguments(config: Path, output_dir: Path, *more: str) -> list[str]:
    return [jobs.PRETRAIN, "--config", str(config), *ARGUMENTS, f"run.output_dir={output_dir}", *more]


def command(config: Path, output_dir: Path) -> Program:
    return jobs.forked(*arguments(config, output_dir), processes=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return jobs.write_config(folder, log={"every": 1, "tensorboard": True})


def test_goes_on_as_if_nothing_had_happened(config: Path, folder: Path) -> None:
    whole, out = folder / "whole", folder / "out"
    assert jobs.run(command(config, whole)).status == 0
    with jobs.started(command(config, out), folder) as job:
        job.wait_until(lambda: latest_name(out / "checkpoints") == "step_00000004")
        job.rank(1).kill()
        assert job.wait() != 0
    # What the killed run saved last has been damaged since.
    checkpoints = out / "checkpoints"
    damaged, older = candidates(checkpoints, print)[:2]
    flip(damaged / "optimizer-00002-of-00002.safetensors", -1)
    result = jobs.run(command(config, out))
    assert result.status == 0, result.output
    assert f"Resuming from step {int(older.name[5:])} ({older})" in result.output
    [warning] = [line for line in result.output.splitlines() if line.endswith(f": trying {older}")]
    assert warning.startswith(f"warning: {damaged} is ")
    assert "optimizer-00002-of-00002.safetensors has the SHA-256 " in warning
    assert jobs.learned(out) == jobs.learned(whole)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/head_1")] == list(range(1, STEPS + 1))
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["latest", *(f"step_{step:08d}" for step in range(2, STEPS + 1, 2))]
    for folder_of_step in candidates(checkpoints, print):
        check_fully(folder_of_step)

    again = jobs.run(command(config, out))
    assert again.status == 0 and f"has already reached step {STEPS}/{STEPS}; nothing to do" in again.output
    assert jobs.learned(out) == jobs.learned(whole), "nothing was touched"


def test_another_kind_of_head_is_refused(config: Path, folder: Path) -> None:
    out = folder / "refused"
    assert jobs.run(command(config, out)).status == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = jobs.run(jobs.forked(*arguments(config, out, "heads.kind=causal", "parallel.pipeline=1")))
    assert result.status == 2
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert sentences[0].startswith("error: heads.kind is 'causal', ") and "checkpoint.allow_changes" in sentences[0]
    assert "Traceback" not in result.output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
