"""What a run reads or writes goes away while it trains, or a rank never comes: it ends soon, and says what happened."""

import os
import re
import shutil
from pathlib import Path

from rich.console import Console

from mtp_dist.cli.data_tables import PreparationProgress
from mtp_dist.data.prepare.prepare import Request, prepare
from mtp_dist.data.sources.text_sources import InputOptions
from mtp_dist.training.watchdog import EXIT_HUNG
from tests.integration import jobs
from tests.integration.test_failures import STOPPED_CLOCK_PROGRAM, assert_checkpoints_are_whole


def error_of(job: jobs.Job) -> str:
    """The one sentence of a job that ends with status 2 and no traceback."""
    assert job.wait() == 2, job.output
    assert job.processes() == []
    assert "Traceback" not in job.output, job.output
    [error] = {line for line in job.stderr.splitlines() if line.startswith("error")}
    return error


def test_a_corpus_that_is_cut_off(tmp_path: Path) -> None:
    """Without a check reading it ends a rank by SIGBUS."""
    prefix = tmp_path / "prepared"
    texts = jobs.write_corpus(tmp_path / "texts")
    options = InputOptions(glob="*.py")
    prepare(
        Request((str(texts),), prefix, "bytes", options, "error", 1),
        PreparationProgress(Console(file=None, quiet=True)),
    )
    config = jobs.write_config(
        tmp_path,
        data={"train": [{"path": str(prefix)}]},
        train={"steps": 100_000},
        checkpoint={"every": 1, "keep_last": 3},
    )
    file = prefix.with_suffix(".bin")
    size = file.stat().st_size
    with jobs.started(jobs.deepspeed(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2"), tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(tmp_path / "out")) >= 4)
        os.truncate(file, 0)
        assert job.wait() == 2, job.output
        assert job.processes() == []
    [error] = [line for line in job.stderr.splitlines() if line.startswith("error")]
    assert re.match("error(: | on rank 1: )", error) and "Bus error" not in job.output
    assert "Traceback" not in job.output, "of the other rank"
    assert f"{file} has 0 bytes, it had {size} when the run began" in error
    assert not (tmp_path / "out" / "summary.json").exists()
    assert_checkpoints_are_whole(tmp_path / "out" / "checkpoints")


def test_a_stream_whose_file_vanishes(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, train={"steps": 100_000}, checkpoint={"every": 1, "keep_last": 3})
    shutil.copytree(tmp_path / "corpus", tmp_path / "streamed")
    source = f"data.train=[{{path: {tmp_path / 'streamed'}, stream: true}}]"
    with jobs.started(jobs.plain(jobs.PRETRAIN, "--config", str(config), source), tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(tmp_path / "out")) >= 4)
        file = tmp_path / "streamed" / "module_1.py"
        file.unlink()
        error = error_of(job)
    assert error.startswith(f"error: data.train.0.path = '{tmp_path / 'streamed'}': cannot read {file} (No such file")
    assert_checkpoints_are_whole(tmp_path / "out" / "checkpoints")


def test_a_file_system_that_blocks(tmp_path: Path) -> None:
    """The thread that saves waits for it; the step that waits for that thread tells."""
    config = jobs.write_config(
        tmp_path, run={"step_timeout": 8}, train={"steps": 100_000}, checkpoint={"every": 1, "keep_last": 3}
    )
    events = tmp_path / "out" / "events.jsonl"
    with jobs.started(jobs.plain(STOPPED_CLOCK_PROGRAM, "--config", str(config)), tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(tmp_path / "out")) >= 4)
        os.mkfifo(tmp_path / "blocks")  # to open it for writing lasts until somebody reads
        (tmp_path / "blocks").rename(events)
        (tmp_path / "hang").touch()
        assert job.wait() == EXIT_HUNG
        assert job.processes() == []
    part = r"the save after step \d+, or the one before"
    assert re.search(rf"error: rank 0: {part} takes longer than run.step_timeout = 8 s; all threads:", job.stderr)
    assert "in _write_with_retries" in job.stderr and re.search(r"saver.py\", line \d+ in join", job.stderr)
    assert_checkpoints_are_whole(tmp_path / "out" / "checkpoints")


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, run={"join_timeout": 2})
    port = jobs.free_port()
    variables = ["RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=0", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}"]
    command = ["env", *variables, *jobs.plain(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2")]
    with jobs.started(command, tmp_path) as job:
        error = error_of(job)
    assert error.startswith("error: within run.join_timeout = 2 s only 1 of 2 ranks came to 127.0.0.1:")
    assert "missing: 1" in error and "frame #" not in job.output
    assert not (tmp_path / "out").exists()


def test_a_job_that_slurm_restarts_without_end(tmp_path: Path) -> None:
    """For example because its time limit is shorter than its start."""
    config = jobs.write_config(tmp_path)
    variables = ["env", "SLURM_JOB_ID=20042", "SLURM_RESTART_COUNT=4"]
    with jobs.started([*variables, *jobs.plain(jobs.PRETRAIN, "--config", str(config))], tmp_path) as job:
        error = error_of(job)
    assert "SLURM has restarted job 20042 4 times since its last checkpoint" in error and "--time" in error
    assert not (tmp_path / "out").exists()
