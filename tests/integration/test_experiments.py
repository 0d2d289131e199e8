"""`mtp-dist experiment` with real trainings: killed, stopped, continued, and with an arm that fails."""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration import jobs

STEPS = 16


def experiment(folder):
    """Return the command of an experiment of three arms, the last of which cannot train: its corpus does not exist."""
    broken = {"heads.count": 1, "data.train": [{"path": str(folder / "missing")}]}
    arms = {"n=1": {"heads.count": 1}, "n=2": {"heads.count": 2}, "broken": broken}
    path = jobs.write_experiment(folder, arms, base={"train": {"steps": STEPS, "validate_every": 1000}})
    return [sys.executable, "-m", "mtp_dist.cli", "experiment", str(path), "--json"]


def steps_of(folder):
    """Return the number of logged steps of each run."""
    return {path.parent.name: len(jobs.metrics(path.parent)) for path in folder.glob("out/*/metrics.jsonl")}


@dataclass(frozen=True)
class Continued:
    """An experiment that was killed, stopped and finished."""

    folder: Path
    status_when_stopped: int
    status: int
    result: dict
    errors: str


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continued")
    command = experiment(folder)
    with jobs.started(command, folder) as job:
        job.wait_until(lambda: max(steps_of(folder).values(), default=0) >= 3)
        job.process.kill()  # its trainings save and end meanwhile
        with jobs.started(command, folder) as again:
            again.wait_until(
                lambda: (folder / "out/n=1_seed-1/summary.json").exists() or max(steps_of(folder).values()) > 9
            )
            again.process.send_signal(signal.SIGINT)
            stopped = again.wait()
            assert again.processes() == []
    with jobs.started(command, folder) as job:
        return Continued(folder, stopped, job.wait(), json.loads(job.stdout), job.stderr)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with jobs.started(experiment(folder), folder) as job:
        assert job.wait() == 1
        return json.loads(job.stdout)


def learned(result):
    """Return the metrics of each run without its speed."""
    return [
        {name: value for name, value in run["metrics"].items() if name != "tokens_per_second"} for run in result["runs"]
    ]


def test_killed_and_stopped_experiment_has_the_same_result(continued, uninterrupted):
    assert continued.status_when_stopped == 128 + signal.SIGINT
    assert learned(continued.result) == learned(uninterrupted)
    logs = [path.read_text() for path in continued.folder.glob("out/n=*/training.log")]
    assert all("Resuming from step" in log for log in logs)
    for result in (continued.result, uninterrupted):
        assert [run["cell"]["heads"] for run in result["runs"]] == ["n=1", "n=2"]


def test_failed_run_is_reported_and_the_others_finish(continued):
    assert continued.status == 1
    assert continued.result["missing_runs"] == ["broken, seed 1"]
    log = continued.folder / "out/broken_seed-1/training.log"
    assert f"failed: broken, seed 1: training: exit status 2, see {log}: error: " in continued.errors
    assert "failed: broken, seed 1: evaluation: its training failed" in continued.errors


def test_result_names_its_origin_and_settings(continued):
    folder, result = continued.folder / "out", continued.result
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["machine"]["cores"] and result["versions"]["torch"] and result["time"] and result["preset"] == "small"
    assert (
        result["runs"][1]["config"]["model"]["trunk_layers"] == 2 == 4 - result["runs"][1]["config"]["heads"]["count"]
    )
    assert (folder / "plot.png").stat().st_size > 5000
    assert "| n=2 | " in (folder / "table.md").read_text()
