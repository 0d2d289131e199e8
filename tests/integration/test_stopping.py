"""The real program, asked to stop, started twice in one folder, or without readers of its output."""

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtp_dist.training.stopping import EXIT_PREEMPTED
from tests.integration import jobs
from tests.integration.forks import Program

SECONDS_TO_END = 60


def write_config(folder: Path, steps: int = 100_000) -> str:
    return str(jobs.write_config(folder, train={"steps": steps}, log={"every": 1, "tensorboard": False}))


def launch(*arguments: str) -> list[str]:
    return [str(jobs.BIN / "mtp-dist"), "launch", "--ranks", "2", *arguments]


def stopped_step(command: list[str] | Program, folder: Path, steps: int, status: int, signalled: Any) -> int:
    """Signal a training after some steps. Return its last step, which it has saved as its only checkpoint."""
    out = folder / "out"
    with jobs.started(command, folder) as job:
        job.wait_until(lambda: len(jobs.metrics(out)) >= 3)
        name = signalled(job).name
        assert job.wait() == status, job.output
        assert job.processes() == []
    [step] = re.findall(rf"{name}: stopping after step (\d+) of {steps} with a checkpoint", job.output)
    assert "Traceback" not in job.output
    checkpoint = f"step_{int(step):08d}"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", checkpoint]
    assert (out / "checkpoints" / "latest").read_text().strip() == checkpoint
    assert jobs.learned(out)[-1]["step"] == int(step) < steps
    assert not (out / "summary.json").exists()
    return int(step)


def test_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    def terminate(job: jobs.Job) -> signal.Signals:
        job.rank(1).send_signal(signal.SIGTERM)
        return signal.SIGTERM

    command = jobs.deepspeed(jobs.PRETRAIN, "--config", write_config(tmp_path, 60), "parallel.pipeline=2")
    stopped_step(command, tmp_path, 60, EXIT_PREEMPTED, terminate)


def test_ctrl_c_saves(tmp_path: Path) -> None:
    def interrupt(job: jobs.Job) -> signal.Signals:
        job.rank(0).send_signal(signal.SIGINT)
        return signal.SIGINT

    command = jobs.forked(jobs.PRETRAIN, "--config", write_config(tmp_path))
    stopped_step(command, tmp_path, 100_000, 128 + signal.SIGINT, interrupt)


def test_launch_forwards_signals_and_waits_for_the_save(tmp_path: Path) -> None:
    def terminate(job: jobs.Job) -> signal.Signals:
        job.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        return signal.SIGTERM

    command = launch("--config", write_config(tmp_path), "parallel.pipeline=2")
    step = stopped_step(command, tmp_path, 100_000, EXIT_PREEMPTED, terminate)
    with jobs.started([*command, "checkpoint.every=1"], tmp_path) as job:
        job.wait_until(lambda: (tmp_path / "out" / "checkpoints" / f"step_{step + 1:08d}").exists())
        job.process.kill()  # type: ignore[union-attr]
        psutil.wait_procs(job.processes(), SECONDS_TO_END)
        assert job.processes() == [] and "SIGTERM: stopping after step" in job.output


@pytest.mark.parametrize("rank", [0, 1])
def test_launch_returns_the_status_of_the_failed_rank(rank: int) -> None:
    program = (
        f"import os, signal, sys, time\nif os.environ['RANK'] == '{rank}': sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)"
    )
    code = (
        "import sys; from mtp_dist.cli import launch; launch.FAILURE_GRACE_S = 0.5\n"
        f"sys.exit(launch._Ranks(2, [sys.executable, '-c', {program!r}]).wait())"
    )
    assert jobs.run(jobs.plain("-c", code)).status == 7


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGUSR1, EXIT_PREEMPTED), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
)
def test_signal_before_the_first_step_ends_the_process(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """Here while it reads its configuration, which it does first."""
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


def test_training_does_not_depend_on_its_readers(tmp_path: Path) -> None:
    result = jobs.run(jobs.forked(jobs.FAULTY, "closed_output", "--config", write_config(tmp_path, 5)))
    assert result.status == 0
    assert (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == "step_00000005\n"


def test_second_run_in_the_folder_of_a_running_one(tmp_path: Path) -> None:
    config, out = write_config(tmp_path), tmp_path / "out"
    again = [jobs.PRETRAIN, "--config", config, "train.steps=3", "checkpoint.resume=none"]
    with jobs.started(jobs.forked(jobs.PRETRAIN, "--config", config, "checkpoint.every=1"), tmp_path) as job:
        job.wait_until(lambda: (out / "checkpoints" / "latest").exists())
        second = jobs.run(jobs.plain(*again))
        assert second.status == 2, second.output
        assert second.stderr.startswith(f"error: run.output_dir = '{out}' is in use by a run on ")
        assert f"(process {job.rank(0).pid})" in second.stderr and second.stderr.count("\n") == 1
        steps = len(jobs.metrics(out))
        job.wait_until(lambda: len(jobs.metrics(out)) > steps)
        assert not (out / "earlier-1").exists()
    third = jobs.run(jobs.forked(*again))
    assert third.status == 0, third.output
    assert f"{out}: taking over the lock of a run on " in third.stderr and "that process has ended" in third.stderr
    assert not [path for path in out.iterdir() if path.name.endswith(".lock")]
