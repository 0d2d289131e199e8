"""The real program, asked to stop, started twice in one folder, or without readers of its output."""

import os
import re
import signal

import psutil
import pytest

from mtp_dist.training.stopping import EXIT_PREEMPTED
from tests.integration import jobs

SECONDS_TO_END = 60


def write_config(folder, steps=100_000):
    return str(jobs.write_config(folder, train={"steps": steps}, log={"tensorboard": False}))


def stopped_step(command, folder, signalled, number=signal.SIGTERM, status=EXIT_PREEMPTED, steps=100_000):
    """Signal a process of a training. Return its last step, which it has saved as its only checkpoint."""
    out = folder / "out"
    with jobs.started(command, folder, steps=3) as job:
        signalled(job).send_signal(number)
        assert job.wait() == status, job.output
        assert job.processes() == []
    [step] = re.findall(rf"{number.name}: stopping after step (\d+) of {steps} with a checkpoint", job.output)
    assert "Traceback" not in job.output
    checkpoint = f"step_{int(step):08d}"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["latest", checkpoint]
    assert (out / "checkpoints" / "latest").read_text().strip() == checkpoint
    assert jobs.metrics(out)[-1]["step"] == int(step) < steps and not (out / "summary.json").exists()
    return int(step)


def test_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path):
    command = jobs.deepspeed(jobs.PRETRAIN, "--config", write_config(tmp_path, 60), "parallel.pipeline=2")
    stopped_step(command, tmp_path, lambda job: job.rank(1), steps=60)


def test_ctrl_c_saves(tmp_path):
    command = jobs.forked(jobs.PRETRAIN, "--config", write_config(tmp_path))
    stopped_step(command, tmp_path, lambda job: job.rank(0), signal.SIGINT, 128 + signal.SIGINT)


def test_launch_forwards_signals_and_waits_for_the_save(tmp_path):
    launch = [str(jobs.BIN / "mtp-dist"), "launch", "--ranks", "2"]
    command = [*launch, "--config", write_config(tmp_path), "parallel.pipeline=2"]
    step = stopped_step(command, tmp_path, lambda job: job.process)
    with jobs.started([*command, "checkpoint.every=1"], tmp_path) as job:
        job.wait_until(lambda: (tmp_path / "out" / "checkpoints" / f"step_{step + 1:08d}").exists())
        job.process.kill()
        psutil.wait_procs(job.processes(), SECONDS_TO_END)
        assert job.processes() == [] and "SIGTERM: stopping after step" in job.output


@pytest.mark.parametrize("rank", [0, 1])
def test_launch_returns_the_status_of_the_failed_rank(rank):
    program = f"import os, signal, sys, time\nif os.environ['RANK'] == '{rank}': sys.exit(7)\n"
    program += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)"
    code = "import sys; from mtp_dist.cli import launch; launch.FAILURE_GRACE_S = 0.5\n"
    code += f"sys.exit(launch._Ranks(2, [sys.executable, '-c', {program!r}]).wait())"
    jobs.run(jobs.plain("-c", code), status=7)


STATUSES = {"SIGTERM": EXIT_PREEMPTED, "SIGUSR1": EXIT_PREEMPTED, "SIGINT": 130, "SIGHUP": 129}


@pytest.mark.parametrize("name", STATUSES)
def test_signal_before_the_first_step_ends_the_process(tmp_path, name):
    """Here while it reads its configuration, which it does first."""
    config, status = tmp_path / "blocks.yaml", STATUSES[name]
    os.mkfifo(config)
    with jobs.started(jobs.plain(jobs.PRETRAIN, "--config", str(config)), tmp_path) as job:
        with config.open("w"):  # as soon as the program reads it
            job.process.send_signal(signal.Signals[name])
            assert job.wait(SECONDS_TO_END) == status, job.output
        [line] = job.output.splitlines()
    assert line.startswith(f"{name}: stopped before the first step") and f"status {status}" in line


def test_training_does_not_depend_on_its_readers(tmp_path):
    jobs.run(jobs.forked(jobs.FAULTY, "closed_output", "--config", write_config(tmp_path, 5)), status=0)
    assert (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == "step_00000005\n"


def test_second_run_in_the_folder_of_a_running_one(tmp_path):
    config, out = write_config(tmp_path), tmp_path / "out"
    again = [jobs.PRETRAIN, "--config", config, "train.steps=3", "checkpoint.resume=none"]
    with jobs.started(jobs.forked(jobs.PRETRAIN, "--config", config, "checkpoint.every=1"), tmp_path) as job:
        job.wait_until(lambda: (out / "checkpoints" / "latest").exists())
        second = jobs.run(jobs.plain(*again), status=2)
        assert second.stderr.startswith(f"error: run.output_dir = '{out}' is in use by a run on ")
        assert f"(process {job.rank(0).pid})" in second.stderr and second.stderr.count("\n") == 1
        steps = len(jobs.metrics(out))
        job.wait_until(lambda: len(jobs.metrics(out)) > steps)
        assert not (out / "earlier-1").exists()
    third = jobs.run(jobs.forked(*again), status=0)
    assert f"{out}: taking over the lock of a run on " in third.stderr and "that process has ended" in third.stderr
    assert not [path for path in out.iterdir() if path.name.endswith(".lock")]
