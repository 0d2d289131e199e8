"""The runner with short programs: how many run at once, in which order, and what failures and signals do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from mtp_dist.errors import ConfigError, LaunchError
from mtp_dist.experiments import runner
from mtp_dist.experiments.grid import expand
from mtp_dist.experiments.runner import TaskRunner, device_slots, hold_lock, visible_gpus
from mtp_dist.experiments.slurm import submit
from mtp_dist.experiments.tasks import EVALUATION, Task, plan, resume_from

SLOTS = [{"SLOT": "a"}, {"SLOT": "b"}]


class Recorder:
    """An observer that counts the running tasks."""

    def __init__(self):
        self.started, self.ended, self.most = [], {}, 0

    def on_start(self, task):
        self.started.append(task.label)

    def on_poll(self, running):
        self.most = max(self.most, len(running))

    def on_end(self, task, failure):
        self.ended[task.label] = failure


@pytest.fixture
def task(tmp_path):
    """Return a function that makes a task of a shell script, whose result is a file of its name."""

    def make(name, script="sleep 0.3; touch $DONE", after=None):
        done = tmp_path / name / "done"
        command = ["bash", "-c", f"DONE={done}; {script}"]
        return Task("training", name, tmp_path / name, done.exists, lambda: command, after=after)

    return make


def run(tasks, tmp_path, slots=SLOTS):
    recorder = Recorder()
    with hold_lock(tmp_path, lambda: None) as lock:
        outcome = TaskRunner(tasks, slots, recorder, lock).run()
    return outcome, recorder


def test_as_many_tasks_as_slots_run_at_once(task, tmp_path):
    tasks = [task(name, "echo $SLOT $(nice); sleep 0.3; touch $DONE") for name in "1234"]
    outcome, recorder = run(tasks, tmp_path)
    assert (outcome.failures, outcome.signal, recorder.most) == ({}, 0, 2)
    assert recorder.started == ["1", "2", "3", "4"]
    logs = [each.log.read_text().split() for each in tasks]
    niceness = str(min(19, os.nice(0) + runner.NICENESS))
    assert sorted(logs[:2]) == [["a", niceness], ["b", niceness]]


def test_failure_stops_only_what_depends_on_it(task, tmp_path):
    bad = task("bad", "echo 'error: no corpus'; exit 2")
    silent = task("silent", "true")
    tasks = [bad, task("evaluation", after=bad), silent, task("good")]
    silent.folder.mkdir()
    silent.log.write_text("error: of an earlier start\n")
    outcome, recorder = run(tasks, tmp_path)
    assert outcome.failures == {
        bad: f"exit status 2, see {bad.log}: error: no corpus",
        tasks[1]: "its training failed",
        silent: f"exit status 0, see {silent.log}",
    }
    assert recorder.ended["good"] is None and recorder.started == ["bad", "silent", "good"]


def test_finished_tasks_do_not_run_again(task, tmp_path):
    first = task("first")
    second = task("second", after=first)
    first.folder.mkdir()
    (first.folder / "done").touch()
    assert run([first, second], tmp_path)[1].started == ["second"]


def test_signal_reaches_every_task_and_starts_no_other(task, tmp_path):
    script = "trap 'echo saved; exit 75' INT; touch $DONE.ready; while true; do sleep 0.05; done"
    tasks = [task(name, script) for name in "12345"]

    def interrupt():
        while len(list(tmp_path.glob("*/done.ready"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    outcome, recorder = run(tasks, tmp_path)
    assert (outcome.failures, outcome.signal, recorder.started) == ({}, signal.SIGINT, ["1", "2"])
    assert [each.log.read_text() for each in tasks[:2]] == ["saved\n"] * 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_lock_is_held_until_the_tasks_of_a_killed_start_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LOCK_TIMEOUT_S", 0.5)
    waits = []
    with hold_lock(tmp_path, lambda: None) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    try:
        with pytest.raises(LaunchError, match="is in use by another"), hold_lock(tmp_path, lambda: waits.append(1)):
            pass
        assert waits == [1]
    finally:
        child.kill()
        child.wait()
    with hold_lock(tmp_path, lambda: waits.append(1)):
        assert waits == [1]


@pytest.mark.parametrize(
    ("ranks", "gpus", "runs_per_gpu", "devices", "threads"),
    [
        (1, 0, 4, [None] * 8, "1"),
        (3, 0, 1, [None] * 2, "1"),
        (1, 2, 1, ["0", "1"], "4"),
        (1, 2, 2, ["0", "1", "0", "1"], "2"),
        (2, 5, 3, ["0,1", "2,3"], "2"),
    ],
)
def test_slots_divide_cores_and_gpus(monkeypatch, ranks, gpus, runs_per_gpu, devices, threads):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    slots = device_slots(ranks, 8, visible_gpus(gpus), runs_per_gpu)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots] == devices
    assert {slot["OMP_NUM_THREADS"] for slot in slots} == {threads}


def test_too_few_devices_are_an_error():
    with pytest.raises(
        LaunchError, match=r"ranks = 8 processes and this machine has 4 GPUs: give another --preset, or"
    ):
        device_slots(8, 64, visible_gpus(4), 1)


def test_tasks_use_the_visible_gpus_only(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8f,2")
    slots = device_slots(1, 8, visible_gpus(3), 1)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["5", "GPU-8f", "2"]


def test_training_without_summary_starts_from_scratch(load, write):
    training = expand(write(), load())[0].training
    (training.folder / "checkpoints/step_00000005").mkdir(parents=True)
    assert resume_from(training) == "auto"
    (training.folder / "checkpoints/step_00000010").mkdir()
    assert resume_from(training) == "none", "a start that finds the last step writes no summary"


def test_folder_of_another_configuration_is_an_error(load, write):
    path = write()
    plan(load(), expand(path, load()))
    changed = {"base/train/steps": 11, "base/train/grad_clip": 0.5}
    with pytest.raises(ConfigError, match=r"seed-1 has a run with another train.grad_clip, train.steps: remove that"):
        plan(load(**changed), expand(write(**changed), load(**changed)))


def all_metrics(name):
    """Return the changes that let an experiment name one metric only."""
    return {"metrics": [name], "compare/metric": name, "plot/metric": name}


def test_plan_reads_what_is_done(load, write):
    training, evaluation, *_ = plan(load(), expand(write(), load()))
    assert not training.is_done() and training.fraction() == 0 and evaluation.after is training
    (training.folder / "metrics.jsonl").write_text('{"step": 2}\n{"step": 5}\n{"st')
    assert training.fraction() == 0.5
    (training.folder / "summary.json").write_text("{}")
    (training.folder / EVALUATION).write_text(json.dumps({"function": "validation", "options": {}, "metrics": {}}))
    assert training.is_done() and evaluation.is_done()
    evaluation = {"function": "synthetic", "options": {"task": "induction"}}
    other = load(evaluation=evaluation, **all_metrics("accuracy/known-second"))
    again = plan(other, expand(write(), load()))[1]
    assert not again.is_done(), "it was evaluated by another function"


def test_slurm_gets_an_array_of_the_unfinished_trainings(load, write, tmp_path, monkeypatch):
    changes = {"pretraining": {"train": {"steps": 100}}, "slurm": {"nodes": 1, "time": "1:00:00"}, "seeds": [1]}
    path = write(**changes)
    experiment = load(**changes)
    runs = expand(path, experiment)
    for run in (runs[0], runs[2]):
        run.training.folder.mkdir(parents=True)
        (run.training.folder / "summary.json").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nwc -l < {tmp_path}/calls\n')
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LaunchError, match="start it from the project's folder"):
        submit(experiment, runs)
    script = tmp_path / "launchers/slurm/pretrain.sbatch"
    script.parent.mkdir(parents=True)
    script.touch()
    assert submit(experiment, runs) == ["1", "2"]
    first, second = (tmp_path / "calls").read_text().splitlines()
    folder = tmp_path / "out/slurm"
    common = "--nodes=1 --time=1:00:00"
    last = "launchers/slurm/pretrain.sbatch --config"
    assert first == f"--parsable --array=0,1,2,3 {common} {last} {folder}/pretraining/%a.yaml"
    assert second == f"--parsable --array=1,3 {common} --dependency=afterok:1 {last} {folder}/training/%a.yaml"
    config = yaml.safe_load((folder / "training/3.yaml").read_text())
    assert config["run"]["output_dir"] == str(runs[3].training.folder)
    assert config["checkpoint"]["initial_weights"] == str(runs[3].training.start.folder)
    (programs / "sbatch").write_text("#!/bin/sh\necho 'error: no partition' >&2\nexit 1\n")
    with pytest.raises(LaunchError, match="sbatch has rejected the job array: error: no partition"):
        submit(experiment, runs)


def test_mistakes_on_the_command_line_are_one_message(write, tmp_path):
    below_a_file = f"{tmp_path}/tiny.yaml/out"
    no_folder = write(**{"presets/small/output_dir": below_a_file}).rename(tmp_path / "other.yaml")
    path = write(evaluation={"function": "code", "options": {"benchmark": "mbpp"}}, **all_metrics("pass@1"))
    for arguments, message in (
        ([], "name an experiment, such as"),
        ([str(path)], f"{path}: evaluation.function = 'code' ex"),
        ([str(no_folder)], f"cannot write {below_a_file} (Not a directory): fix that"),
    ):
        command = [sys.executable, "-m", "mtp_dist.cli", "experiment", *arguments]
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 2 and finished.stderr.startswith(f"error: {message}")
        assert finished.stderr.count("\n") == 1
