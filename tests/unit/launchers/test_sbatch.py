"""What launchers/slurm/pretrain.sbatch makes of SLURM's variables. tests/slurm runs it on a real SLURM."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from mtp_dist.training.stopping import REQUEUE

PROJECT = Path(__file__).resolve().parents[3]
SCRIPT = PROJECT / "launchers" / "slurm" / "pretrain.sbatch"

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.txt
printf '%s\\n' "$WORLD_SIZE" "$MASTER_ADDR" "$MASTER_PORT" > variables.txt
env > environment.txt
exit "${STATUS:-0}"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") printf '%s\\n' gpu-7 gpu-8 ;;
"show node") printf '%s\\n' "NodeName=$3 CoresPerSocket=8" "   NodeAddr=10.0.0.7 NodeHostName=$3" ;;
requeue*) echo "$2" > requeued.txt ;;
esac
"""


@dataclass(frozen=True)
class Outcome:
    status: int
    output: str
    srun: list[str]
    """Arguments."""
    variables: list[str]
    environment: list[str]
    """Of srun, NAME=VALUE."""
    requeued: str


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project folder with a space in its name, and commands of SLURM that note what they are asked."""
    folder = tmp_path / "a project"
    (folder / "bin").mkdir(parents=True)
    (folder / "launchers").symlink_to(PROJECT / "launchers")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> Outcome:
    job = {"SLURM_JOB_ID": "20042", "SLURM_JOB_NODELIST": "gpu-[7-8]", "SLURM_CPUS_ON_NODE": "64"}
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", **job, **variables}
    result = subprocess.run(["bash", SCRIPT, *arguments], cwd=folder, env=environment, capture_output=True, text=True)

    def noted(name: str) -> list[str]:
        path = folder / f"{name}.txt"
        return path.read_text().splitlines() if path.exists() else []

    requeued = "".join(noted("requeued"))
    output = result.stdout + result.stderr
    return Outcome(result.returncode, output, noted("srun"), noted("variables"), noted("environment"), requeued)


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.mark.parametrize(
    ("variables", "of_a_node", "cores"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, 8, 8),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4, 16),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, 2, 32),
        ({}, 1, 64),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "2"}, 4, 1),
    ],
)
def test_one_rank_a_gpu(folder: Path, variables: dict[str, str], of_a_node: int, cores: int) -> None:
    outcome = run(folder, "--config", "c.yaml", **variables)
    assert outcome.status == 0, outcome.output
    assert value(outcome.srun, "--ntasks") == str(2 * of_a_node)
    assert value(outcome.srun, "--ntasks-per-node") == str(of_a_node)
    assert value(outcome.srun, "--cpus-per-task") == str(cores)
    assert outcome.variables == [str(2 * of_a_node), "10.0.0.7", "10042"]


@pytest.mark.regression("7.C1")
def test_the_number_of_threads_is_left_to_the_program(folder: Path) -> None:
    assert not [line for line in run(folder).environment if line.startswith("OMP_NUM_THREADS=")]
    assert "OMP_NUM_THREADS=3" in run(folder, OMP_NUM_THREADS="3").environment


def test_arguments_are_handed_on_as_they_are(folder: Path) -> None:
    given = ["--config", "my configs/x.yaml", "data.train=[{path: 'a b', glob: '*.py'}]", "run.name=100%a"]
    outcome = run(folder, *given)
    assert outcome.srun[-5:] == ["launchers/pretrain.py", *given]


def test_an_array_has_its_number_in_the_arguments(folder: Path) -> None:
    outcome = run(
        folder, "--config", "c/%a.yaml", "run.name=%a-%a", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_JOB_ID="20040"
    )
    assert outcome.srun[-2:] == ["c/3.yaml", "run.name=3-3"]


def test_a_restart_goes_on_from_its_own_checkpoints(folder: Path) -> None:
    given = ["--config", "c.yaml", "checkpoint.resume=elsewhere"]
    assert run(folder, *given, SLURM_RESTART_COUNT="0").srun[-1] == given[-1]
    assert run(folder, *given, SLURM_RESTART_COUNT="1").srun[-2:] == [given[-1], "checkpoint.resume=auto"]


@pytest.mark.parametrize(("status", "requeued"), [(0, ""), (1, ""), (2, ""), (137, ""), (143, ""), (REQUEUE, "20042")])
def test_only_a_run_that_has_saved_is_requeued(folder: Path, status: int, requeued: str) -> None:
    outcome = run(folder, "--config", "c.yaml", STATUS=str(status))
    assert outcome.requeued == requeued
    assert outcome.status == (0 if requeued else status)


def test_one_job_of_an_array_is_requeued_alone(folder: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "20042", "SLURM_ARRAY_TASK_ID": "9"}
    assert run(folder, STATUS=str(REQUEUE), **array).requeued == "20042_9"


def test_the_python_of_the_environment(folder: Path) -> None:
    for name in (".venv", "my environment"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "activate").write_text(f"export STATUS={len(name)}")
    assert run(folder).status == len(".venv")
    assert run(folder, VENV="my environment").status == len("my environment")
    assert run(folder, CONTAINER="image.sif").status == 0, "the image has its own"


def test_containers(folder: Path) -> None:
    mounts = {"CONTAINER_MOUNTS": "/data:/data,/scratch:/scratch"}
    pyxis = run(folder, "--config", "c.yaml", CONTAINER="my images/x.sqsh", **mounts).srun
    assert value(pyxis, "--container-image") == "my images/x.sqsh"
    assert value(pyxis, "--container-workdir") == str(folder)
    assert value(pyxis, "--container-mounts") == f"{folder}:{folder},{mounts['CONTAINER_MOUNTS']}"
    assert pyxis.index("--container-mounts") < pyxis.index("bash"), "an option of srun"
    assert pyxis[-4:] == ["python", "launchers/pretrain.py", "--config", "c.yaml"]

    apptainer = run(folder, "--config", "c.yaml", CONTAINER="my images/x.sif").srun
    inside = apptainer[apptainer.index("rank") + 1 :]
    options = ["--nv", "--bind", str(folder), "--pwd", str(folder)]
    assert inside == ["apptainer", "exec", *options, "my images/x.sif", "python", *pyxis[-3:]]


def test_another_folder_is_refused(folder: Path) -> None:
    (folder / "launchers").unlink()
    outcome = run(folder)
    assert outcome.status == 2 and not outcome.srun
    [sentence] = outcome.output.splitlines()
    assert sentence.startswith(f"error: {folder} has no launchers/pretrain.py: submit from the project's folder")
