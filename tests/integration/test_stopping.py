"""The real program, asked to stop, and going on without anybody who reads what it prints."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mtp_dist.training.stopping import EXIT_PREEMPTED
from tests.integration import jobs

STEPS = 60
SECONDS_TO_END = 60


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, train={"steps": STEPS}, log={"every": 1, "tensorboard": False})
    out = tmp_path / "out"
    with jobs.started(jobs.deepspeed(jobs.PRETRAIN, "--config", str(config), "parallel.pipeline=2"), tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(out)) >= 3)
        job.rank(1).send_signal(signal.SIGTERM)
        assert job.wait() == EXIT_PREEMPTED, job.output
        assert job.processes() == []
    [said] = re.findall(r"SIGTERM: stopping after step (\d+) of 60 with a checkpoint", job.output)
    assert "Traceback" not in job.output
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", f"step_{int(said):08d}"]
    assert jobs.learned(out)[-1]["step"] == int(said) < STEPS
    assert not (out / "summary.json").exists()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGUSR1, EXIT_PREEMPTED), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
)
def test_a_signal_before_the_first_step(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """It ends the process at once: here while it reads its configuration, the first thing that it does."""
    config = tmp_path / "blocks.yaml"
    os.mkfifo(config)
    command = jobs.plain(jobs.PRETRAIN, "--config", str(config))
    with subprocess.Popen(
        command, cwd=jobs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            with config.open("w"):  # as soon as the program reads it
                process.send_signal(number)
                output, _ = process.communicate(timeout=SECONDS_TO_END)
        finally:
            process.kill()
    assert process.returncode == status, output
    [line] = output.splitlines()
    assert line.startswith(f"{number.name}: stopped before the first step") and f"status {status}" in line


def test_ctrl_c_saves(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, train={"steps": 100_000}, log={"every": 1, "tensorboard": False})
    out = tmp_path / "out"
    with jobs.started(jobs.forked(jobs.PRETRAIN, "--config", str(config)), tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(out)) >= 3)
        job.rank(0).send_signal(signal.SIGINT)
        assert job.wait() == 128 + signal.SIGINT, job.output
    [step] = re.findall(r"SIGINT: stopping after step (\d+) of 100000 with a checkpoint", job.output)
    assert "Traceback" not in job.output
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{int(step):08d}"


def test_training_does_not_depend_on_its_readers(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, log={"every": 1, "tensorboard": False})
    result = jobs.run(jobs.forked(jobs.FAULTY, "closed_output", "--config", str(config)))
    assert result.status == 0
    assert (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == "step_00000005\n"


def test_a_second_run_in_the_folder_of_a_living_one(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, log={"every": 1, "tensorboard": False})
    out = tmp_path / "out"
    first = jobs.forked(jobs.PRETRAIN, "--config", str(config), "train.steps=100000", "checkpoint.every=1")
    again = ["--config", str(config), "train.steps=3", "checkpoint.resume=none"]
    with jobs.started(first, tmp_path) as job:
        job.wait_until(lambda: (out / "checkpoints" / "latest").exists())
        pid = job.rank(0).pid
        second = jobs.run(jobs.plain(jobs.PRETRAIN, *again))
        assert second.status == 2, second.output
        assert second.stderr.startswith(f"error: run.output_dir = '{out}' is in use by a run on ")
        assert f"(process {pid})" in second.stderr and second.stderr.count("\n") == 1
        steps = len(jobs.metrics(out))
        job.wait_until(lambda: len(jobs.metrics(out)) > steps)
        assert not (out / "earlier-1").exists()
    third = jobs.run(jobs.forked(jobs.PRETRAIN, *again))
    assert third.status == 0, third.output
    assert f"{out}: taking over the lock of a run on " in third.stderr and "that process has ended" in third.stderr
    assert not [path for path in out.iterdir() if path.name.endswith(".lock")]


def launch(*arguments: str, ranks: int = 2) -> list[str]:
    return [str(jobs.BIN / "mtp-dist"), "launch", "--ranks", str(ranks), *arguments]


def test_the_launcher_gives_its_ranks_the_signal_and_the_time_to_save(tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path, train={"steps": 100_000}, log={"every": 1, "tensorboard": False})
    out = tmp_path / "out"
    with jobs.started(launch("--config", str(config), "parallel.pipeline=2"), tmp_path) as job:
        job.wait_until(lambda: len(jobs.metrics(out)) >= 3)
        job.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        assert job.wait() == EXIT_PREEMPTED, job.output
        assert job.processes() == []
    [step] = re.findall(r"SIGTERM: stopping after step (\d+) of 100000 with a checkpoint", job.output)
    assert "Traceback" not in job.output
    assert (out / "checkpoints" / "latest").read_text().strip() == f"step_{int(step):08d}"

    with jobs.started(launch("--config", str(config), "parallel.pipeline=2", "checkpoint.every=1"), tmp_path) as job:
        job.wait_until(lambda: (out / "checkpoints" / f"step_{int(step) + 1:08d}").exists())
        job.process.kill()  # type: ignore[union-attr]
        with_ranks = job.processes()
        psutil.wait_procs(with_ranks, SECONDS_TO_END)
        assert job.processes() == [] and "SIGTERM: stopping after step" in job.output


@pytest.mark.parametrize("rank", [0, 1])
def test_the_launcher_ends_with_the_rank_that_failed(tmp_path: Path, rank: int) -> None:
    program = (
        "import os, signal, sys, time\n"
        f"if os.environ['RANK'] == '{rank}': sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(1000)"
    )
    code = (
        "import sys; from mtp_dist.cli import launch; launch.FAILURE_GRACE_S = 0.5\n"
        f"sys.exit(launch._Ranks(2, [sys.executable, '-c', {program!r}]).wait())"
    )
    assert jobs.run([sys.executable, "-c", code]).status == 7
