"""launchers/slurm/pretrain.sbatch on a real SLURM: two nodes with one rank each, and a space in every path."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration import jobs
from tests.slurm.cluster import Cluster, missing_programs, running_cluster

STEPS = 60
COMPLETE, STOPPED = "1", "2"
"""Jobs of the array: the same training, which a signal stops in one of them."""
SECONDS_BETWEEN_STARTS = 4
"""A node takes a start in the second of the last end for the ended one, and the job would fail."""
ENDS = ("COMPLETED", "FAILED", "CANCELLED")
CONFIG = ("--config", "my configs/tiny.yaml")

MISSING = ", ".join(missing_programs())
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed ({MISSING}): make test-slurm")


@pytest.fixture(scope="module")
def cluster():
    with running_cluster() as started:
        yield started
    assert started.processes() == []


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Create the parts of a checkout that a job needs."""
    folder = tmp_path_factory.mktemp("slurm") / "a project"
    configs = folder / "my configs"
    configs.mkdir(parents=True)
    for name in ("launchers", "mtp_dist"):
        (folder / name).symlink_to(jobs.ROOT / name)
    if (Path(sys.prefix) / "bin" / "activate").exists():
        (folder / ".venv").symlink_to(sys.prefix)
    jobs.write_config(configs, parallel={"pipeline": 2}, train={"steps": STEPS, "validate_every": 20}, log={"every": 1})
    return folder


@dataclass(frozen=True)
class Submitted:
    cluster: Cluster
    project: Path
    name: str
    """The job as SLURM's commands name it."""
    output_dir: Path

    @property
    def state(self):
        return self.cluster.job(self.name).get("JobState", "")

    @property
    def restarts(self):
        return int(self.cluster.job(self.name).get("Restarts", 0))

    @property
    def log(self):
        return (self.project / f"mtp-dist-{self.cluster.job(self.name)['JobId']}.out").read_text()

    def wait_for_steps(self, count):
        def has_steps():
            assert self.state not in ENDS, f"{self.state}:\n{self.log}"
            return len(jobs.metrics(self.output_dir)) >= count

        self.cluster.wait(f"{count} steps", has_steps)

    def wait_for_end(self):
        self.cluster.wait(f"the end of job {self.name}", lambda: self.state in ENDS)

    def wait_for_restart(self):
        def has_left_the_queue():
            # By itself SLURM lets a requeued job wait for two minutes.
            self.cluster.client("scontrol", "update", f"JobId={self.name}", "StartTime=now")
            return self.state in ("RUNNING", *ENDS)

        self.cluster.wait("a requeue", lambda: self.restarts == 1 or self.state in ENDS)
        time.sleep(SECONDS_BETWEEN_STARTS)
        self.cluster.wait("the job's second start", has_left_the_queue)


def submit(cluster, project, *options):
    # Jobs share the nodes, unlike with the file's --exclusive, so that their ports must differ.
    on_both_nodes = ("--nodes", "2", "--ntasks-per-node", "1", "--gpus-per-task", "1", "--oversubscribe", *options)
    # As on sites whose jobs export nothing: srun must pass on what the ranks need.
    exported = ("--export", "SLURM_CONF,PATH")
    # resume=none applies to the first start only.
    arguments = (*CONFIG, "run.output_dir=my runs/%a", "checkpoint.resume=none")
    return cluster.submit(*on_both_nodes, *exported, "launchers/slurm/pretrain.sbatch", *arguments, folder=project)


@pytest.fixture(scope="module")
def array(cluster, project):
    """Run both trainings to their ends, at the same time and on the same nodes."""
    number = submit(cluster, project, f"--array={COMPLETE},{STOPPED}")
    folders = {task: project / "my runs" / task for task in (COMPLETE, STOPPED)}
    runs = {task: Submitted(cluster, project, f"{number}_{task}", folder) for task, folder in folders.items()}
    runs[STOPPED].wait_for_steps(3)
    cluster.client("scancel", "--signal", "USR1", runs[STOPPED].name)
    assert runs[COMPLETE].state == "RUNNING"
    runs[STOPPED].wait_for_restart()
    for run in runs.values():
        run.wait_for_end()
    return runs


def test_stopped_job_resumes(array):
    complete, stopped = array[COMPLETE], array[STOPPED]
    assert (complete.state, complete.restarts) == ("COMPLETED", 0), complete.log
    assert (stopped.state, stopped.restarts) == ("COMPLETED", 1), stopped.log
    [stop] = [line for line in stopped.log.splitlines() if "SIGUSR1: stopping after step " in line]
    [start] = [line for line in stopped.log.splitlines() if "Resuming from step " in line]
    step = int(stop.split("after step ")[1].split()[0])
    assert 3 <= step < STEPS and f"Resuming from step {step} (my runs/{STOPPED}/checkpoints/" in start
    assert "srun: error" not in complete.log


def test_stopped_job_is_bitwise_identical(array):
    complete, stopped = array[COMPLETE].output_dir, array[STOPPED].output_dir
    expected = jobs.learned(complete)
    assert sum("loss/total" in line for line in expected) == STEPS
    assert jobs.learned(stopped) == expected
    for path in (complete / f"checkpoints/step_{STEPS:08d}").glob("*.safetensors"):
        assert (stopped / path.relative_to(complete)).read_bytes() == path.read_bytes(), path.name


def test_rank_0_finishes_its_work_after_the_other_ranks(cluster, project):
    """The sample at the end of the run takes longer than srun would wait after the end of another rank."""
    script = (project / "launchers" / "slurm" / "pretrain.sbatch").read_text()
    changes = {"--wait 120": "--wait 1", "python launchers/pretrain.py": f"python {jobs.FAULTY} long_sample"}
    for text, replacement in changes.items():
        assert text in script
        script = script.replace(text, replacement)
    (project / "impatient.sbatch").write_text(script)
    output_dir = project / "my runs" / "sampled"
    keys = ("run.output_dir=my runs/sampled", "train.steps=2", "log.tensorboard=false")
    job = ("--nodes", "2", "--ntasks-per-node", "1", "impatient.sbatch", *CONFIG, *keys)
    run = Submitted(cluster, project, cluster.submit(*job, folder=project), output_dir)
    run.wait_for_end()
    assert run.state == "COMPLETED", run.log
    assert '"sample": "def f"' in (output_dir / "summary.json").read_text()


def test_cancelled_job_is_not_requeued(cluster, project):
    run = Submitted(cluster, project, submit(cluster, project), project / "my runs" / "%a")
    run.wait_for_steps(3)
    cluster.client("scancel", run.name)
    run.wait_for_end()
    cluster.wait("the nodes are idle", lambda: cluster.client("squeue", "-h") == "")
    assert (run.state, run.restarts) == ("CANCELLED", 0), run.log


def test_runs_of_an_experiment_are_an_array(cluster, project):
    folder = project / "my experiment"
    folder.mkdir()
    slurm = {"nodes": 1, "ntasks-per-node": 1, "gpus-per-task": 1, "export": "SLURM_CONF,PATH"}
    arms = {"n=1": {"heads.count": 1}, "n=2": {"heads.count": 2}}
    path = jobs.write_experiment(folder, arms, slurm=slurm, base={"train": {"steps": 2}})
    command = [sys.executable, "-m", "mtp_dist.cli", "experiment", str(path), "--slurm", "--json"]
    environment = cluster.environment | {"PYTHONPATH": str(jobs.ROOT)}
    submitted = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    [array] = json.loads(submitted.stdout)["jobs"]
    for task, name in enumerate(("n=1_seed-1", "n=2_seed-1")):
        run = Submitted(cluster, project, f"{array}_{task}", folder / "out" / name)
        run.wait_for_end()
        assert run.state == "COMPLETED", run.log
        assert json.loads((run.output_dir / "summary.json").read_text())["name"] == name.replace("_seed-", ", seed ")
