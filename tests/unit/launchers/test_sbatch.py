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
env -0 > environment.txt
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
    """What a job did, as the stand-ins of SLURM's commands recorded it."""

    output: str
    srun: list[str]
    """srun's arguments."""
    environment: dict[str, str]
    requeued: str

    def rendezvous(self):
        return [self.environment[name] for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]

    def option(self, name):
        """Return the value of an option of srun."""
        return self.srun[self.srun.index(name) + 1]


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


def run(folder, arguments=("--config", "c.yaml"), status=0, **variables):
    """Run the script as a job does. Fail if another status is returned."""
    for path in folder.glob("*.txt"):
        path.unlink()
    job = {"SLURM_JOB_ID": "20042", "SLURM_JOB_NODELIST": "gpu-[7-8]", "SLURM_CPUS_ON_NODE": "64"}
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", **job, **variables}
    result = subprocess.run(["bash", SCRIPT, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == status, output
    files = [folder / f"{name}.txt" for name in ("srun", "environment", "requeued")]
    srun, seen, requeued = (path.read_text() if path.exists() else "" for path in files)
    return Outcome(output, srun.splitlines(), dict(re.findall("([^=\0]+)=([^\0]*)", seen)), requeued.strip())


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
    outcome, ranks = run(folder, **variables), str(2 * ranks_per_node)
    options = [outcome.option(name) for name in ("--ntasks", "--ntasks-per-node", "--cpus-per-task")]
    assert options == [ranks, str(ranks_per_node), str(cores)]
    assert outcome.rendezvous() == [ranks, "10.0.0.7", "10042"]
    # PrivateData=nodes: `scontrol show node` finds none.
    assert run(folder, PRIVATE_DATA="nodes", **variables).rendezvous() == [ranks, "gpu-7", "10042"]


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
    arguments = run(folder, given, **variables).srun
    assert tuple(arguments[arguments.index("launchers/pretrain.py") + 1 :]) == passed


def test_only_preempted_runs_are_requeued(folder):
    for status in (0, 1, 2, 137, 143):
        assert run(folder, status=status, STATUS=str(status)).requeued == ""
    assert run(folder, STATUS=str(EXIT_PREEMPTED)).requeued == "20042"
    # Each job of an array is requeued alone and has its own GPUs: one that has ended has none any more.
    array = {"SLURM_ARRAY_JOB_ID": "20042", "SLURM_ARRAY_TASK_ID": "9"}
    assert run(folder, STATUS=str(EXIT_PREEMPTED), **array).requeued == "20042_9"
    nodes = "     Nodes=gpu-[7-8] CPU_IDs=0-63 Mem=0 GRES=gpu:a100:8(IDX:0-7)"
    run(folder, SLURM_GPUS_ON_NODE="8", JOB_NODES=nodes, **array)


def test_virtual_environment(folder):
    for name in (".venv", "my environment"):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin" / "activate").write_text(f"export STATUS={len(name)}")
    run(folder, status=len(".venv"))
    run(folder, status=len("my environment"), VENV="my environment")
    run(folder, CONTAINER="image.sif")  # the image has its own


def test_containers(folder):
    mounts = "/data:/data,/scratch:/scratch"
    outcome = run(folder, CONTAINER="my images/x.sqsh", CONTAINER_MOUNTS=mounts)
    assert outcome.option("--container-image") == "my images/x.sqsh"
    assert outcome.option("--container-workdir") == str(folder)
    assert outcome.option("--container-mounts") == f"{folder}:{folder},{mounts}"
    pyxis = outcome.srun
    assert pyxis.index("--container-mounts") < pyxis.index("bash"), "an option of srun"
    assert pyxis[-4:] == ["python", "launchers/pretrain.py", "--config", "c.yaml"]

    apptainer = run(folder, CONTAINER="my images/x.sif").srun
    options = ["--nv", "--bind", str(folder), "--pwd", str(folder)]
    inside = ["apptainer", "exec", *options, "my images/x.sif", "python", *pyxis[-3:]]
    assert apptainer[apptainer.index("rank") + 1 :] == inside


def test_environment_of_the_ranks(folder):
    seen = run(folder).environment
    assert "OMP_NUM_THREADS" not in seen and run(folder, OMP_NUM_THREADS="3").environment["OMP_NUM_THREADS"] == "3"
    assert seen["PYTHONUNBUFFERED"] == "1", "the last lines of a killed rank are not lost"
    # After `sbatch --export=NONE`, which sites recommend, srun passes no variables on by default.
    assert run(folder, SLURM_EXPORT_ENV="NONE").option("--export") == "ALL"
    # --gpus-per-task implies that each task sees its own GPU only, which NCCL cannot copy between.
    per_task = {"SLURM_GPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "gres:gpu:1", "SLURM_GPU_BIND": "single:1"}
    outcome = run(folder, SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="8", **per_task)
    assert outcome.option("--gpu-bind") == "none" and not outcome.environment.keys() & per_task


def refusal(folder, **options):
    """Return the only line of a job that starts nothing."""
    outcome = run(folder, status=2, **options)
    [message] = outcome.output.splitlines()
    assert message.startswith("error: ") and not outcome.srun, outcome
    return message


NODES = "     Nodes=gpu-7 Mem=0 GRES=gpu:a100:8(IDX:0-7)\n     Nodes=gpu-8 Mem=0 GRES=gpu:a100:{}(IDX:0,2-4)"


def test_refusals(folder):
    assert "--config" in refusal(folder, arguments=())
    differ = refusal(folder, SLURM_GPUS_ON_NODE="8", JOB_NODES=NODES.format(4))
    assert "different numbers of GPUs (4 8): name it with --gpus-per-node" in differ
    run(folder, SLURM_GPUS_ON_NODE="8", JOB_NODES=NODES.format(8))
    assert "heterogeneous" in refusal(folder, SLURM_GPUS_ON_NODE="8", SLURM_HET_SIZE="2")
    assert "--gpus-per-node" in refusal(folder, GRES_TYPES="gpu,craynetwork")
    assert "--gpus-per-node" in refusal(folder, GRES_TYPES="gpu", SLURM_NTASKS_PER_NODE="8")
    on_cpus = ("--config", "c.yaml", "run.device=cpu")
    assert run(folder, on_cpus, GRES_TYPES="gpu", SLURM_NTASKS_PER_NODE="4").option("--ntasks") == "8"
    run(folder, GRES_TYPES="gpu", SLURM_GPUS_ON_NODE="8")
    run(folder, GRES_TYPES="bandwidth")
    (folder / "launchers").unlink()
    missing = f"error: {folder} has no launchers/pretrain.py: submit from the project's folder"
    assert refusal(folder).startswith(missing)


def test_used_ports_are_skipped(folder):
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", jobs.free_port()))
        port = first.getsockname()[1]
        second.bind(("", port + 1))
        for taken in (first, second):
            taken.listen()
        outcome = run(folder, SLURM_JOB_ID=str(port - 10_000))
    assert int(outcome.environment["MASTER_PORT"]) > port + 1


def test_no_empty_array():
    """Before bash 4.4 an empty array counts as unset, which `set -u` rejects."""
    assert not re.findall(r"\w+=\(\)", SCRIPT.read_text())
