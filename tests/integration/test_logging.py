"""What a real run writes for people, over two starts of which the second repeats a step."""

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.monitoring.writers.wandb import WandbWriter
from mtp_dist.training.stopping import EXIT_PREEMPTED
from tests.integration import jobs

HAS_WANDB = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not HAS_WANDB, reason="the package wandb is not installed")
STEPS = 3


@dataclass(frozen=True)
class Run:
    folder: Path
    starts: list[jobs.Result]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("logging")
    log = {"rank_logs": True, "wandb": "tests" if HAS_WANDB else None}
    config = jobs.write_config(
        folder, train={"steps": STEPS}, parallel={"pipeline": 2}, checkpoint={"every": 2}, log=log
    )
    command = ["env", "WANDB_MODE=offline", *jobs.torchrun(jobs.PRETRAIN, "--config", str(config))]
    starts = [jobs.run(command)]
    assert starts[0].status == 0, starts[0].output
    shutil.rmtree(folder / f"out/checkpoints/step_{STEPS:08d}")  # as if killed in the last step
    starts.append(jobs.run(command))
    assert starts[1].status == 0, starts[1].output
    return Run(folder / "out", starts)


def test_rank_logs_continue_after_a_restart(run: Run) -> None:
    assert sorted(path.name for path in (run.folder / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    texts = [(run.folder / f"logs/rank_0000{rank}.log").read_text() for rank in (0, 1)]
    assert [text.count(f": rank {rank} of 2 starts on ") for rank, text in enumerate(texts)] == [2, 2]
    assert [text.count(f"step {STEPS}/{STEPS} ") for text in texts] == [2, 0]
    for start in run.starts:
        assert set(start.stdout.splitlines()) <= set(texts[0].splitlines())
        assert start.stdout.count(f"step {STEPS}/{STEPS} ") == 1
        assert start.stdout.count("data.train.0: ") == 1 and " bytes of text; " in start.stdout, "what rank 0 read"


def wandb_records(path: Path) -> list[Any]:
    """Return what `wandb sync` would upload: the file has LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # complete, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


@needs_wandb
def test_wandb_continues_the_same_run(run: Run) -> None:
    files = sorted((run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    run_id = (run.folder / "wandb/run_id").read_text()
    losses = {line["step"]: line["loss/head_4"] for line in jobs.metrics(run.folder) if "loss/head_4" in line}
    for path, steps in zip(files, ([1, 2, 3], [3]), strict=True):
        records = wandb_records(path)
        [started] = [record.run for record in records if record.HasField("run")]
        assert (started.run_id, started.project, started.display_name) == (run_id, "tests", "tiny")
        config = {item.key: json.loads(item.value_json) for r in records for item in r.config.update}
        assert config["train"]["steps"] == STEPS and config["layout"] == {"tensor": 1, "pipeline": 2, "data": 1}
        assert "step" in {record.metric.step_metric for record in records if record.HasField("metric")}
        rows = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        assert {row["step"]: row["loss/head_4"] for row in rows if "loss/head_4" in row} == {
            step: losses[step] for step in steps
        }


def train_with_wandb(folder: Path, *environment: str, **sections: dict[str, Any]) -> list[str]:
    log = {"wandb": "tests", "tensorboard": False}
    config = jobs.write_config(folder, log=log, **sections)
    return ["env", "-u", "WANDB_MODE", *environment, *jobs.plain(jobs.PRETRAIN, "--config", str(config))]


@needs_wandb
def test_run_without_a_wandb_login_does_not_start(tmp_path: Path) -> None:
    nobody = ["-u", "WANDB_API_KEY", f"HOME={tmp_path}", f"NETRC={tmp_path / 'none'}"]
    result = jobs.run(train_with_wandb(tmp_path, *nobody))
    assert result.status == 2, result.output
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: log.wandb = 'tests' cannot log in to Weights & Biases: "), result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@needs_wandb
def test_training_continues_without_the_wandb_service(tmp_path: Path) -> None:
    nowhere = ["WANDB_BASE_URL=http://127.0.0.1:9", "WANDB_INIT_TIMEOUT=2", f"WANDB_API_KEY={'0' * 40}"]
    result = jobs.run(train_with_wandb(tmp_path, *nowhere, train={"steps": 1}))
    assert result.status == 0, result.output
    assert "warning: Weights & Biases writes to the disk only: " in result.stderr
    [file] = (tmp_path / "out/wandb").glob("offline-run-*/*.wandb")
    assert sum(record.HasField("history") for record in wandb_records(file)) == 2  # a step and a validation


@needs_wandb
def test_signal_that_ends_the_wandb_service_stops_the_run(tmp_path: Path) -> None:
    """SLURM sends SIGTERM to every process of a job, which the service does not survive."""
    out = tmp_path / "out"
    command = train_with_wandb(tmp_path, "WANDB_MODE=offline", train={"steps": 100_000})
    with jobs.started(command, tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(out)) >= 3)
        processes = job.processes()
        assert len(processes) > 1, "the service is a process of its own"
        for process in processes:
            process.terminate()
        assert job.wait() == EXIT_PREEMPTED, job.output
    assert "warning: No longer logging to Weights & Biases, training continues: " in job.stderr
    assert (out / f"checkpoints/step_{jobs.learned(out)[-1]['step']:08d}").is_dir()


@needs_wandb
@pytest.mark.parametrize("failed", [False, True])
def test_wandb_marks_failed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = WandbWriter("tests", "tiny", tmp_path)
    writer.write(1, {"loss/head_1": 2.0})
    writer.close(failed)
    wandb.teardown()  # waits for the service, which writes the file
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    codes = [record.exit.exit_code for record in wandb_records(file) if record.HasField("exit")]
    assert codes == [int(failed)]
