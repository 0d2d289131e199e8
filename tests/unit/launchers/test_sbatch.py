"""How launchers/slurm/pretrain.sbatch uses the variables of SLURM. tests/slurm runs it on a real SLURM."""

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from mtp_dist.training.stopping import EXIT_PREEMPTED
from tests.integration import jobs

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
"show node")
    [[ -z $PRIVATE_DATA ]] || { echo "Node $3 not found"; exit 1; }
    printf '%s\\n' "NodeName=$3 CoresPerSocket=8" "   NodeAddr=10.0.0.7 NodeHostName=$3" "   ThreadsPerCore=2" ;;
"show config") echo "GresTypes               = ${GRES_TYPES-(null)}" ;;
"show job")
    printf '%s\\n' "JobId=$4 JobName=mtp-dist" "$JOB_NODES"
    # The id of a whole array shows all of its jobs, also those that have ended.
    [[ $4 != "$SLURM_ARRAY_JOB_ID" ]] || echo "     Nodes=gpu-[7-8] CPU_IDs=0-63 Mem=0 GRES=" ;;
requeue*) echo "$2" > requeued.txt ;;
esac
"""


@dataclass(frozen=True)
class Outcome:
    """What a job did; the stand-ins of SLURM's commands record lines in files."""

    status: int
    output: str
    folder: Path

    def recorded(self, name):
        path = self.folder / f"{name}.txt"
        return path.read_text().splitlines() if path.exists() else []

    def option(self, name):
        """Return the value of an option of srun."""
        arguments = self.recorded("srun")
        return arguments[arguments.index(name) + 1]


@pytest.fixture
def folder(tmp_path):
    """Return a project folder with a space in its name, and SLURM commands that record their arguments."""
    folder = tmp_path / "a project"
    (folder / "bin").mkdir(parents=True)
    (folder / "launchers").symlink_to(PROJECT / "launchers")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(folder, *arguments, **variables):
    """Run the script as a job does; without arguments with a configuration."""
    for path in folder.glob("*.txt"):
        path.unlink()
    job = {"SLURM_JOB_ID": "20042", "SLURM_JOB_NODELIST": "gpu-[7-8]", "SLURM_CPUS_ON_NODE": "64"}
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", **job, **variables}
    command = ["bash", SCRIPT, *(arguments or ("--config", "c.yaml"))]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return Outcome(result.returncode, result.stdout + result.stderr, folder)


@pytest.mark.parametrize(
    ("variables", "ranks_per_node", "cores"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, 8, 8),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4, 16),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, 2, 32),
        ({}, 1, 64),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "2"}, 4, 1),
        # Whole cores of the smallest node: SLURM rounds odd numbers of hardware threads up, and the step does not fit.
        *(
            ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "104", "SLURM_JOB_CPUS_PER_NODE": cpus}, 8, cores)
            for cpus, cores in (("104(x2)", 12), ("64,52", 6), ("64(x3),26", 2), ("8(x2)", 1))
        ),
    ],
)
def test_one_rank_per_gpu(folder, variables, ranks_per_node, cores):
    outcome = run(folder, **variables)
    assert outcome.status == 0, outcome.output
    assert outcome.option("--ntasks") == str(2 * ranks_per_node)
    assert outcome.option("--ntasks-per-node") == str(ranks_per_node)
    assert outcome.option("--cpus-per-task") == str(cores)
    assert outcome.recorded("variables") == [str(2 * ranks_per_node), "10.0.0.7", "10042"]


def test_thread_count_is_not_set(folder):
    assert not [line for line in run(folder).recorded("environment") if line.startswith("OMP_NUM_THREADS=")]
    assert "OMP_NUM_THREADS=3" in run(folder, OMP_NUM_THREADS="3").recorded("environment")


RESUME = ("--config", "c", "checkpoint.resume=x")
LIST = ("--config", "my configs/x.yaml", "data.train=[{path: 'a b', glob: '*.py'}]", "run.name=100%a")
ARRAY_TASK = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "20040"}


@pytest.mark.parametrize(
    ("given", "variables", "passed"),
    [
        (LIST, {}, LIST),
        (("--config", "c/%a.yaml", "run.name=%a-%a"), ARRAY_TASK, ("--config", "c/3.yaml", "run.name=3-3")),
        (RESUME, {"SLURM_RESTART_COUNT": "0"}, RESUME),
        (RESUME, {"SLURM_RESTART_COUNT": "1"}, (*RESUME, "checkpoint.resume=auto")),
    ],
)
def test_arguments(folder, given, variables, passed):
    arguments = run(folder, *given, **variables).recorded("srun")
    assert tuple(arguments[arguments.index("launchers/pretrain.py") + 1 :]) == passed


@pytest.mark.parametrize(
    ("status", "requeued"), [*((status, []) for status in (0, 1, 2, 137, 143)), (EXIT_PREEMPTED, ["20042"])]
)
def test_only_preempted_runs_are_requeued(folder, status, requeued):
    outcome = run(folder, STATUS=str(status))
    assert outcome.recorded("requeued") == requeued
    assert outcome.status == (0 if requeued else status)


def test_jobs_of_an_array(folder):
    """Each is requeued alone and has its own GPUs: one that has ended has none any more."""
    array = {"SLURM_ARRAY_JOB_ID": "20042", "SLURM_ARRAY_TASK_ID": "9"}
    assert run(folder, STATUS=str(EXIT_PREEMPTED), **array).recorded("requeued") == ["20042_9"]
    nodes = "     Nodes=gpu-[7-8] CPU_IDs=0-63 Mem=0 GRES=gpu:a100:8(IDX:0-7)"
    outcome = run(folder, SLURM_GPUS_ON_NODE="8", JOB_NODES=nodes, **array)
    assert outcome.status == 0, outcome.output


def test_virtual_environment(folder):
    for name in (".venv", "my environment"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "activate").write_text(f"export STATUS={len(name)}")
    assert run(folder).status == len(".venv")
    assert run(folder, VENV="my environment").status == len("my environment")
    assert run(folder, CONTAINER="image.sif").status == 0, "the image has its own"


def test_containers(folder):
    mounts = {"CONTAINER_MOUNTS": "/data:/data,/scratch:/scratch"}
    outcome = run(folder, CONTAINER="my images/x.sqsh", **mounts)
    assert outcome.option("--container-image") == "my images/x.sqsh"
    assert outcome.option("--container-workdir") == str(folder)
    assert outcome.option("--container-mounts") == f"{folder}:{folder},{mounts['CONTAINER_MOUNTS']}"
    pyxis = outcome.recorded("srun")
    assert pyxis.index("--container-mounts") < pyxis.index("bash"), "an option of srun"
    assert pyxis[-4:] == ["python", "launchers/pretrain.py", "--config", "c.yaml"]

    apptainer = run(folder, CONTAINER="my images/x.sif").recorded("srun")
    inside = apptainer[apptainer.index("rank") + 1 :]
    options = ["--nv", "--bind", str(folder), "--pwd", str(folder)]
    assert inside == ["apptainer", "exec", *options, "my images/x.sif", "python", *pyxis[-3:]]


def refusal(outcome):
    """Return the only line of a job that starts nothing."""
    assert outcome.status == 2 and not outcome.recorded("srun"), outcome
    [message] = outcome.output.splitlines()
    assert message.startswith("error: ")
    return message


def test_export_none(folder):
    """After `sbatch --export=NONE`, which sites recommend, srun passes no variables on by default."""
    outcome = run(folder, SLURM_EXPORT_ENV="NONE")
    assert outcome.option("--export") == "ALL"
    assert "PYTHONUNBUFFERED=1" in outcome.recorded("environment"), "the last lines of a killed rank are not lost"


def test_private_nodes(folder):
    """PrivateData=nodes: `scontrol show node` finds none."""
    outcome = run(folder, PRIVATE_DATA="nodes")
    assert outcome.status == 0, outcome.output
    assert outcome.recorded("variables") == ["2", "gpu-7", "10042"]


def test_tasks_see_all_gpus_of_their_node(folder):
    """--gpus-per-task implies that each task sees its own only, which NCCL cannot copy between."""
    per_task = {"SLURM_GPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "gres:gpu:1", "SLURM_GPU_BIND": "single:1"}
    outcome = run(folder, SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="8", **per_task)
    assert outcome.option("--gpu-bind") == "none"
    assert not [line for line in outcome.recorded("environment") if line.partition("=")[0] in per_task]


NODES = "     Nodes=gpu-7 Mem=0 GRES=gpu:a100:8(IDX:0-7)\n     Nodes=gpu-8 Mem=0 GRES=gpu:a100:{}(IDX:0,2-4)"


def test_nodes_with_different_gpus_and_jobs_without_are_refused(folder):
    differ = refusal(run(folder, SLURM_GPUS_ON_NODE="8", JOB_NODES=NODES.format(4)))
    assert "different numbers of GPUs (4 8): name it with --gpus-per-node" in differ
    assert run(folder, SLURM_GPUS_ON_NODE="8", JOB_NODES=NODES.format(8)).status == 0
    assert "heterogeneous" in refusal(run(folder, SLURM_GPUS_ON_NODE="8", SLURM_HET_SIZE="2"))
    assert "--gpus-per-node" in refusal(run(folder, GRES_TYPES="gpu,craynetwork"))
    assert "--gpus-per-node" in refusal(run(folder, GRES_TYPES="gpu", SLURM_NTASKS_PER_NODE="8"))
    on_cpus = run(folder, "--config", "c.yaml", "run.device=cpu", GRES_TYPES="gpu", SLURM_NTASKS_PER_NODE="4")
    assert (on_cpus.status, on_cpus.option("--ntasks")) == (0, "8")
    assert run(folder, GRES_TYPES="gpu", SLURM_GPUS_ON_NODE="8").status == 0
    assert run(folder, GRES_TYPES="bandwidth").status == 0


def test_used_ports_are_skipped(folder):
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", jobs.free_port()))
        port = first.getsockname()[1]
        second.bind(("", port + 1))
        for taken in (first, second):
            taken.listen()
        outcome = run(folder, SLURM_JOB_ID=str(port - 10_000))
    assert int(outcome.recorded("variables")[2]) > port + 1


def test_no_empty_array():
    """Before bash 4.4 an empty array counts as unset, which `set -u` rejects."""
    assert not re.findall(r"\w+=\(\)", SCRIPT.read_text())


def test_other_refusals(folder):
    result = subprocess.run(["bash", SCRIPT], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 2 and "--config" in result.stderr
    (folder / "launchers").unlink()
    message = refusal(run(folder))
    assert message.startswith(f"error: {folder} has no launchers/pretrain.py: submit from the project's folder")
