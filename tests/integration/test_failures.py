"""A rank that fails ends the whole job, soon, with an error, and leaves nothing running and nothing half-written."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtp_dist.checkpoint.reader import load_weights
from tests.integration import jobs

FAULTY_PROGRAM = str(Path(__file__).with_name("train_with_fault.py"))
NAN_PROGRAM = str(Path(__file__).with_name("train_with_nan.py"))
FULL_DISK_PROGRAM = str(Path(__file__).with_name("train_on_a_full_disk.py"))
STOPPED_CLOCK_PROGRAM = str(Path(__file__).with_name("train_with_stopped_clock.py"))

Launch = Callable[..., list[str]]


def assert_ends_with_an_error(job: jobs.Job) -> None:
    """Call this when a rank has just failed. Without the launcher the others would wait for half an hour."""
    assert job.wait() != 0
    assert job.processes() == []


def assert_checkpoints_are_whole(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    finished = [name for name in names if re.fullmatch(r"step_\d{8}", name)]
    unfinished = [name for name in names if name.endswith(".unfinished")]
    assert finished and len(unfinished) <= 1 and {*names} == {*finished, *unfinished, "latest"}, names
    assert (folder / "latest").read_text().strip() in finished
    expected = load_weights(folder / finished[0])[1]
    for name in finished:
        weights = load_weights(folder / name)[1]
        assert {key: weight.shape for key, weight in weights.items()} == {k: w.shape for k, w in expected.items()}


@pytest.mark.parametrize("launch", [jobs.deepspeed, jobs.torchrun])
def test_a_rank_that_raises(tmp_path: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    config = jobs.write_config(tmp_path)
    monkeypatch.setenv("FAULTY_RANK", "1")
    with jobs.started(launch(FAULTY_PROGRAM, "--config", str(config), "parallel.pipeline=2"), tmp_path) as job:
        job.wait_until((tmp_path / "raised").exists)
        assert_ends_with_an_error(job)
        assert "RuntimeError: this sample cannot be read" in job.output
        assert "Traceback" in job.output and "read_or_raise" in job.output
    assert [line["step"] for line in jobs.metrics(tmp_path / "out")] == [1]
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(("launch", "rank"), [(jobs.deepspeed, 1), (jobs.torchrun, 0)])
def test_a_rank_that_is_killed(tmp_path: Path, launch: Launch, rank: int) -> None:
    config = jobs.write_config(tmp_path, train={"steps": 100_000}, checkpoint={"every": 1})
    with jobs.started(launch(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2"), tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(tmp_path / "out")) >= 4)
        job.rank(rank).kill()
        assert_ends_with_an_error(job)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert_checkpoints_are_whole(tmp_path / "out" / "checkpoints")


def test_a_full_disk(tmp_path: Path) -> None:
    """Training goes on without the checkpoints in between; without the last one the run has failed."""
    config = jobs.write_config(tmp_path, checkpoint={"every": 2}, log={"tensorboard": True})
    result = jobs.run(jobs.forked(FULL_DISK_PROGRAM, "--config", str(config)))
    assert result.status == 2, result.output
    checkpoints = tmp_path / "out" / "checkpoints"
    for step in (2, 4, 5):
        file = checkpoints / f"step_{step:08d}.unfinished" / "model-00001-of-00001.safetensors"
        wrong = f"cannot write into checkpoint.directory: {file}: "
        assert result.stderr.count(f"warning: checkpoint of step {step}: {wrong}") == 1
        assert result.stderr.count(f"warning: checkpoint of step {step} is NOT saved: {wrong}") == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {wrong}") and "File too large" in error
    assert "Traceback" not in result.output
    assert list(checkpoints.iterdir()) == [], "nothing takes the room that the logs need"
    assert max(line["step"] for line in jobs.metrics(tmp_path / "out")) == 5
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    notes = [note.tensor_proto.string_val[0].decode() for note in events.Tensors("note/text_summary")]
    assert sum("is NOT saved" in note for note in notes) == 3
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    """The rank that waits for it reports where and writes its last collectives; the launcher ends what is left."""
    config = jobs.write_config(tmp_path, run={"step_timeout": 8}, train={"steps": 100_000})
    command = jobs.deepspeed(STOPPED_CLOCK_PROGRAM, "--config", str(config), "parallel.pipeline=2")
    with jobs.started(command, tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(tmp_path / "out")) >= 3)
        job.rank(1).suspend()
        (tmp_path / "hang").touch()
        assert job.wait() != 0
        assert job.processes() == []
        assert re.search(r"error: rank 0: step \d+ takes longer than run.step_timeout = 8 s; all threads:", job.output)
        # In a pass of the step or in the all-reduce after it.
        assert "in train_step" in job.output and "in fit" in job.output
    record = pickle.loads((tmp_path / "out" / "flight_recorder" / "rank_00000").read_bytes())
    last = record["entries"][-1]
    assert last["profiling_name"].startswith("gloo:") and last["frames"], "which collective, and who called it"
    assert f"rank 0: its last collective was {last['profiling_name']}" in job.output


def test_a_gradient_that_is_not_a_number(tmp_path: Path) -> None:
    """Steps are skipped, the rank and the weight are named, and after as many as are allowed the run ends."""
    config = jobs.write_config(
        tmp_path, train={"steps": 100, "max_skipped_steps": 2, "validate_every": None}, checkpoint={"every": 1}
    )
    command = jobs.deepspeed(NAN_PROGRAM, "--config", str(config), "parallel.pipeline=2", "train.precision=bf16")
    with jobs.started(command, tmp_path) as job:
        assert job.wait() == 2
        out = tmp_path / "out"
        where = "first on rank 1 (stage 1): the gradient of heads.2.0.mlp.linear_fc1.weight"
        for step in (3, 4):
            assert f"step {step} changed no parameter: the gradient is not finite, {where}" in job.output
        [error] = [line for line in job.stderr.splitlines() if line.startswith("error")]
        assert "train.max_skipped_steps = 2 steps in a row were skipped, the last one was step 4" in error
        assert "Traceback" not in job.output
    lines = jobs.metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["train/grad_norm"] is None for line in lines] == [False, False, True, True]
    assert [line["train/grad_norm/head_2"] is None for line in lines] == [False, False, True, True]
    assert lines[3]["train/grad_norm/head_1"] > 0, "not what no sum has touched"
    assert (out / "events.jsonl").read_text().count('"kind": "skip"') == 2
    assert_checkpoints_are_whole(out / "checkpoints")
    before, after = (load_weights(out / "checkpoints" / f"step_0000000{step}")[1] for step in (2, 3))
    assert before and all(torch.equal(after[name], weight) for name, weight in before.items())
