"""launchers/slurm/pretrain.sbatch on a real SLURM: two nodes, one rank on each, every path with a space in it."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration import jobs
from tests.integration.jobs import learned
from tests.slurm.cluster import Cluster, missing_programs, running_cluster

STEPS = 60
WHOLE, STOPPED = "1", "2"
"""The jobs of the array: the same training, which a signal stops in one of them."""
SECONDS_BETWEEN_STARTS = 4
"""A node takes a start in the second of the last end for that last one, which is over: the job would fail."""
ENDS = ("COMPLETED", "FAILED", "CANCELLED")

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"SLURM is not installed ({', '.join(missing_programs())}): make test-slurm"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as started:
        yield started
    assert started.processes() == []


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout, as far as a job needs one."""
    folder = tmp_path_factory.mktemp("slurm") / "a project"
    folder.mkdir()
    for name in ("launchers", "mtp_dist"):
        (folder / name).symlink_to(jobs.ROOT / name)
    if (Path(sys.prefix) / "bin" / "activate").exists():
        (folder / ".venv").symlink_to(sys.prefix)
    (folder / "my configs").mkdir()
    jobs.write_config(
        folder / "my configs", parallel={"pipeline": 2}, train={"steps": STEPS, "validate_every": 20}, log={"every": 1}
    )
    return folder


@dataclass(frozen=True)
class Submitted:
    cluster: Cluster
    project: Path
    name: str
    """As SLURM's commands take it."""
    output_dir: Path

    @property
    def state(self) -> str:
        return self.cluster.job(self.name).get("JobState", "")

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.name).get("Restarts", 0))

    @property
    def log(self) -> str:
        return (self.project / f"mtp-dist-{self.cluster.job(self.name)['JobId']}.out").read_text()

    def wait_for_steps(self, count: int) -> None:
        self.cluster.wait(f"{count} steps", lambda: self._has_steps(count))

    def _has_steps(self, count: int) -> bool:
        assert self.state not in ENDS, f"{self.state}:\n{self.log}"
        return len(jobs.metrics(self.output_dir)) >= count

    def wait_for_state(self, *states: str) -> None:
        self.cluster.wait(f"job {self.name} is {states}", lambda: self.state in states)

    def wait_for_restart(self) -> None:
        self.cluster.wait("a requeue", lambda: self.restarts == 1 or self.state in ENDS)
        time.sleep(SECONDS_BETWEEN_STARTS)
        self.cluster.wait("the job's second start", self._has_left_the_queue)

    def _has_left_the_queue(self) -> bool:
        # By itself SLURM lets a requeued job wait for two minutes.
        self.cluster.client("scontrol", "update", f"JobId={self.name}", "StartTime=now")
        return self.state in ("RUNNING", *ENDS)


def submit(cluster: Cluster, project: Path, *options: str) -> str:
    # Nodes that jobs share, unlike the file's --exclusive: that is what ports must stand.
    on_both_nodes = ("--nodes", "2", "--ntasks-per-node", "1", "--gpus-per-task", "1", "--oversubscribe", *options)
    # As on sites where jobs export nothing: what the ranks need, srun has to be told to pass on.
    exported = ("--export", "SLURM_CONF,PATH")
    # resume=none holds for the first start only.
    arguments = ("--config", "my configs/tiny.yaml", "run.output_dir=my runs/%a", "checkpoint.resume=none")
    return cluster.submit(*on_both_nodes, *exported, "launchers/slurm/pretrain.sbatch", *arguments, folder=project)


@pytest.fixture(scope="module")
def array(cluster: Cluster, project: Path) -> dict[str, Submitted]:
    """Both trainings at their ends; they ran at the same time, on the same nodes."""
    number = submit(cluster, project, f"--array={WHOLE},{STOPPED}")
    runs = {
        task: Submitted(cluster, project, f"{number}_{task}", project / "my runs" / task) for task in (WHOLE, STOPPED)
    }
    runs[STOPPED].wait_for_steps(3)
    cluster.client("scancel", "--signal", "USR1", runs[STOPPED].name)
    assert runs[WHOLE].state == "RUNNING"
    runs[STOPPED].wait_for_restart()
    for run in runs.values():
        run.wait_for_state(*ENDS)
    return runs


def test_a_stopped_job_goes_on_where_it_was(array: dict[str, Submitted]) -> None:
    whole, stopped = array[WHOLE], array[STOPPED]
    assert (whole.state, whole.restarts) == ("COMPLETED", 0), whole.log
    assert (stopped.state, stopped.restarts) == ("COMPLETED", 1), stopped.log
    [said] = [line for line in stopped.log.splitlines() if "SIGUSR1: stopping after step " in line]
    [first_step] = [line for line in stopped.log.splitlines() if "Resuming from step " in line]
    step = int(said.split("after step ")[1].split()[0])
    assert 3 <= step < STEPS and f"Resuming from step {step} (my runs/{STOPPED}/checkpoints/" in first_step
    assert "srun: error" not in whole.log


def test_the_stop_changes_no_bit_of_what_is_learned(array: dict[str, Submitted]) -> None:
    expected = learned(array[WHOLE].output_dir)
    assert sum("loss/total" in line for line in expected) == STEPS
    assert learned(array[STOPPED].output_dir) == expected
    last = f"checkpoints/step_{STEPS:08d}"
    for path in (array[WHOLE].output_dir / last).glob("*.safetensors"):
        assert (array[STOPPED].output_dir / last / path.name).read_bytes() == path.read_bytes(), path.name


def test_rank_0_ends_its_work_although_srun_waits_for_seconds_only(cluster: Cluster, project: Path) -> None:
    """The sample at the end of the run takes longer than srun would wait for it after the end of another rank."""
    script = (project / "launchers" / "slurm" / "pretrain.sbatch").read_text()
    assert "--wait 120" in script and "python launchers/pretrain.py" in script
    script = script.replace("--wait 120", "--wait 1").replace(
        "python launchers/pretrain.py", f"python {jobs.FAULTY} long_sample"
    )
    (project / "impatient.sbatch").write_text(script)
    output_dir = project / "my runs" / "sampled"
    keys = ("run.output_dir=my runs/sampled", "train.steps=2", "log.tensorboard=false")
    job = ("--nodes", "2", "--ntasks-per-node", "1", "impatient.sbatch", "--config", "my configs/tiny.yaml", *keys)
    run = Submitted(cluster, project, cluster.submit(*job, folder=project), output_dir)
    run.wait_for_state(*ENDS)
    assert run.state == "COMPLETED", run.log
    assert '"sample": "def f"' in (output_dir / "summary.json").read_text()


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, project: Path) -> None:
    run = Submitted(cluster, project, submit(cluster, project), project / "my runs" / "%a")
    run.wait_for_steps(3)
    cluster.client("scancel", run.name)
    run.wait_for_state(*ENDS)
    cluster.wait("the nodes are idle", lambda: cluster.client("squeue", "-h") == "")
    assert (run.state, run.restarts) == ("CANCELLED", 0), run.log
