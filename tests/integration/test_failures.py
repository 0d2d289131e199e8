"""Ranks that fail, hang or never come, and files that vanish: the job soon ends with an error, nothing runs on."""

import os
import pickle
import re
import shutil

import torch

from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.training.watchdog import EXIT_HUNG
from tests.integration import jobs

ENDLESS = {"train": {"steps": 100_000}, "checkpoint": {"every": 1, "keep_last": 3}}


def assert_nothing_runs(job):
    """Wait for the end of a failed job and return its status. Without a launcher other ranks would wait for long."""
    status = job.wait()
    assert status != 0 and job.processes() == []
    return status


def user_error(job):
    """Return the only error message of a job that ends with status 2."""
    assert assert_nothing_runs(job) == 2, job.output
    assert "Traceback" not in job.output, job.output
    [error] = {line for line in job.stderr.splitlines() if line.startswith("error")}
    return error


def assert_checkpoints_are_valid(folder):
    names = [path.name for path in folder.iterdir()]
    finished = [name for name in names if re.fullmatch(r"step_\d{8}", name)]
    unfinished = [name for name in names if name.endswith(".unfinished")]
    assert finished and len(unfinished) <= 1 and {*names} == {*finished, *unfinished, "latest"}, names
    assert (folder / "latest").read_text().strip() in finished
    shapes = [{key: weight.shape for key, weight in load_weights(folder / name)[1].items()} for name in finished]
    assert all(shape == shapes[0] for shape in shapes)


def test_rank_that_raises(tmp_path, monkeypatch):
    config = jobs.write_config(tmp_path)
    monkeypatch.setenv("FAULTY_RANK", "1")
    command = jobs.deepspeed(jobs.FAULTY, "unreadable_sample", "--config", str(config), "parallel.pipeline=2")
    with jobs.started(command, tmp_path) as job:
        job.wait_until((tmp_path / "raised").exists)
        assert_nothing_runs(job)
        assert "RuntimeError: this sample cannot be read" in job.output
        assert "Traceback" in job.output and "read_or_raise" in job.output
    out = tmp_path / "out"
    assert [line["step"] for line in jobs.metrics(out)] == [1]
    assert not (out / "checkpoints").exists() and not (out / "summary.json").exists()


def test_rank_that_is_killed(tmp_path):
    config = jobs.write_config(tmp_path, train={"steps": 100_000}, checkpoint={"every": 1})
    command = jobs.torchrun(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2")
    with jobs.started(command, tmp_path, steps=4) as job:
        job.rank(0).kill()
        assert_nothing_runs(job)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert_checkpoints_are_valid(tmp_path / "out" / "checkpoints")


def test_full_disk(tmp_path):
    """Training continues without the checkpoints in between; without the last one the run has failed."""
    config, out = jobs.write_config(tmp_path, checkpoint={"every": 2}), tmp_path / "out"
    result = jobs.run(jobs.forked(jobs.FAULTY, "full_disk", "--config", str(config)), status=2)
    for step in (2, 4, 5):
        file = out / f"checkpoints/step_{step:08d}.unfinished/model-00001-of-00001.safetensors"
        wrong = f"cannot write into checkpoint.directory: {file}: "
        assert result.stderr.count(f"warning: checkpoint of step {step}: {wrong}") == 1
        assert result.stderr.count(f"warning: checkpoint of step {step} is NOT saved: {wrong}") == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {wrong}") and "File too large" in error
    assert "Traceback" not in result.output
    assert list((out / "checkpoints").iterdir()) == [], "nothing takes the room that the logs need"
    assert max(line["step"] for line in jobs.metrics(out)) == 5 and not (out / "summary.json").exists()
    assert (out / "events.jsonl").read_text().count("is NOT saved") == 3


def test_rank_that_hangs(tmp_path):
    """The waiting rank reports where and writes its last collectives; the launcher ends the other one."""
    config = jobs.write_config(tmp_path, run={"step_timeout": 8}, train={"steps": 100_000})
    command = jobs.deepspeed(jobs.FAULTY, "stopped_clock", "--config", str(config), "parallel.pipeline=2")
    with jobs.started(command, tmp_path, steps=3) as job:
        job.rank(1).suspend()
        (tmp_path / "hang").touch()
        assert_nothing_runs(job)
        assert re.search(r"error: rank 0: step \d+ takes longer than run.step_timeout = 8 s; all threads:", job.output)
        assert "in train_step" in job.output and "in fit" in job.output
    record = pickle.loads((tmp_path / "out" / "flight_recorder" / "rank_00000").read_bytes())
    last = record["entries"][-1]
    assert last["profiling_name"].startswith("gloo:") and last["frames"], "which collective, and who called it"
    assert f"rank 0: its last collective was {last['profiling_name']}" in job.output


def test_file_system_that_blocks(tmp_path):
    """The saving thread waits for it, and the watchdog ends the step that waits for this thread."""
    config, out = jobs.write_config(tmp_path, run={"step_timeout": 8}, **ENDLESS), tmp_path / "out"
    with jobs.started(jobs.plain(jobs.FAULTY, "stopped_clock", "--config", str(config)), tmp_path, steps=4) as job:
        os.mkfifo(tmp_path / "blocks")  # opening it for writing blocks until something reads it
        (tmp_path / "blocks").rename(out / "events.jsonl")
        (tmp_path / "hang").touch()
        assert assert_nothing_runs(job) == EXIT_HUNG
    phase = r"the save after step \d+, or the one before"
    assert re.search(rf"error: rank 0: {phase} takes longer than run.step_timeout = 8 s; all threads:", job.stderr)
    assert "in _write_with_retries" in job.stderr and re.search(r"saver.py\", line \d+ in join", job.stderr)
    assert_checkpoints_are_valid(out / "checkpoints")


def test_nan_gradient(tmp_path):
    """Steps are skipped, the rank and the parameter are named, and after the allowed number the run ends."""
    train, out = {"steps": 100, "max_skipped_steps": 2, "validate_every": None}, tmp_path / "out"
    config = jobs.write_config(tmp_path, train=train, checkpoint={"every": 1})
    overrides = ["parallel.pipeline=2", "train.precision=bf16"]
    command = jobs.forked(jobs.FAULTY, "nan_gradient", "--config", str(config), *overrides, processes=2)
    with jobs.started(command, tmp_path) as job:
        error = user_error(job)
    assert "train.max_skipped_steps = 2 steps in a row were skipped, the last one was step 4" in error
    where = "first on rank 1 (stage 1): the gradient of heads.2.0.mlp.linear_fc1.weight"
    for step in (3, 4):
        assert f"step {step} changed no parameter: the gradient is not finite, {where}" in job.output
    lines = jobs.metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    norms = [(line["train/grad_norm"], line["train/grad_norm/head_2"]) for line in lines]
    assert None not in norms[0] + norms[1] and norms[2:] == [(None, None)] * 2
    assert lines[3]["train/grad_norm/head_1"] > 0, "head 1 is not affected"
    assert (out / "events.jsonl").read_text().count('"kind": "skip"') == 2
    assert_checkpoints_are_valid(out / "checkpoints")
    before, after = (load_weights(out / "checkpoints" / f"step_0000000{step}")[1] for step in (2, 3))
    assert before and all(torch.equal(after[name], weight) for name, weight in before.items())


def test_truncated_corpus(tmp_path):
    """Without a check, reading it would end a rank with SIGBUS."""
    prefix, texts = tmp_path / "prepared", jobs.write_corpus(tmp_path / "texts")
    options = ["--glob", "*.py", "--to", str(prefix), "--tokenizer", "bytes", "--workers", "1"]
    jobs.run(jobs.forked("-m", "mtp_dist.cli", "prepare", str(texts), *options), status=0)
    config = jobs.write_config(tmp_path, data={"train": [{"path": str(prefix)}]}, **ENDLESS)
    file = prefix.with_suffix(".bin")
    size = file.stat().st_size
    command = jobs.forked(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2", processes=2)
    with jobs.started(command, tmp_path, steps=4) as job:
        os.truncate(file, 0)
        error = user_error(job)
    assert re.match("error(: | on rank 1: )", error) and "Bus error" not in job.output
    assert f"{file} has 0 bytes, it had {size} when the run started" in error
    assert not (tmp_path / "out" / "summary.json").exists()
    assert_checkpoints_are_valid(tmp_path / "out" / "checkpoints")


def test_stream_whose_file_vanishes(tmp_path):
    config, folder = jobs.write_config(tmp_path, **ENDLESS), tmp_path / "streamed"
    shutil.copytree(tmp_path / "corpus", folder)
    file, source = folder / "module_1.py", f"data.train=[{{path: {folder}, stream: true}}]"
    with jobs.started(jobs.forked(jobs.PRETRAIN, "--config", str(config), source), tmp_path, steps=4) as job:
        file.unlink()
        error = user_error(job)
    assert error.startswith(f"error: data.train.0.path = '{folder}': cannot read {file} (No such file")
    assert_checkpoints_are_valid(tmp_path / "out" / "checkpoints")


def test_rank_that_never_comes(tmp_path):
    config = jobs.write_config(tmp_path, run={"join_timeout": 2})
    variables = ["RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=0", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={jobs.free_port()}"]
    command = ["env", *variables, *jobs.plain(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2")]
    with jobs.started(command, tmp_path) as job:
        error = user_error(job)
    assert error.startswith("error: within run.join_timeout = 2 s only 1 of 2 ranks joined at 127.0.0.1:")
    assert "missing: 1" in error and "frame #" not in error
    assert not (tmp_path / "out").exists()
