"""The real program, killed in the middle: the same command goes on and ends as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration import jobs

STEPS = 12
MEASURED = ("throughput/", "memory/")
ARGUMENTS = [f"train.steps={STEPS}", "checkpoint.every=3", "parallel.pipeline=2"]


def learned(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)} for line in jobs.metrics(folder)
    ]


def arguments(config: Path, output_dir: Path, *more: str) -> list[str]:
    return [jobs.PRETRAIN, "--config", str(config), *ARGUMENTS, f"run.output_dir={output_dir}", *more]


def command(config: Path, output_dir: Path) -> list[str]:
    return jobs.torchrun(*arguments(config, output_dir))


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
        job.wait_until((out / "checkpoints" / "step_00000003").exists)
        job.rank(1).kill()
        assert job.wait() != 0
    result = jobs.run(command(config, out))
    assert result.status == 0, result.output
    assert "goes on after step " in result.output
    assert learned(out) == learned(whole)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/head_1")] == list(range(1, STEPS + 1))
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in range(3, STEPS + 1, 3)]

    again = jobs.run(command(config, out))
    assert again.status == 0 and f"is at step {STEPS} of {STEPS}: nothing is left to train" in again.output
    assert learned(out) == learned(whole), "nothing was touched"


def test_another_kind_of_head_is_refused(config: Path, folder: Path) -> None:
    out = folder / "refused"
    assert jobs.run(command(config, out)).status == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = jobs.run(jobs.plain(*arguments(config, out, "heads.kind=causal", "parallel.pipeline=1")))
    assert result.status == 2
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert sentences[0].startswith("error: heads.kind is 'causal', ") and "checkpoint.allow_changes" in sentences[0]
    assert "Traceback" not in result.output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
