"""Submission of an experiment's trainings as SLURM job arrays of launchers/slurm/pretrain.sbatch."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtp_dist.errors import LaunchError
from mtp_dist.experiments.grid import Run, Training
from mtp_dist.experiments.schema import Experiment
from mtp_dist.experiments.tasks import config_path, is_trained, write_config

SCRIPT = Path("launchers", "slurm", "pretrain.sbatch")


def submit(experiment: Experiment, runs: Sequence[Run]) -> list[str]:
    """Submit the trainings that are not finished, one array task each, and return the ids of the arrays.

    A second array, of the trainings that start from one of the first, waits for it. Raise LaunchError if sbatch
    rejects a job.
    """
    if not SCRIPT.exists():
        raise LaunchError(
            f"--slurm submits {SCRIPT}, which this folder does not have: start it from the project's folder"
        )
    if shutil.which("sbatch") is None:
        raise LaunchError("--slurm needs sbatch, which is not on the PATH: log in to a node of a SLURM cluster")
    starts = {run.training.start.folder: run.training.start for run in runs if run.training.start}
    jobs: list[str] = []
    for name, trainings in (("pretraining", [*starts.values()]), ("training", [run.training for run in runs])):
        # Tasks of an earlier submission may still read their configurations: a training keeps its number.
        if unfinished := {n: training for n, training in enumerate(trainings) if not is_trained(training)}:
            jobs.append(_submit_array(experiment, name, unfinished, jobs))
    return jobs


def _submit_array(experiment: Experiment, name: str, trainings: Mapping[int, Training], after: Sequence[str]) -> str:
    """Submit an array of trainings by their numbers, in which alone the names of their configurations differ."""
    folder = Path(experiment.output_dir, "slurm", name)
    folder.mkdir(parents=True, exist_ok=True)
    for number, training in trainings.items():
        write_config(training)
        link = folder / f"{number}.yaml"
        link.unlink(missing_ok=True)
        link.symlink_to(config_path(training).resolve())
    options = [f"--{option}={value}" for option, value in experiment.slurm.items()]
    options += [f"--dependency=afterok:{job}" for job in after]
    command = ["sbatch", "--parsable", f"--array={','.join(map(str, trainings))}", *options, str(SCRIPT)]
    command += ["--config", str(folder / "%a.yaml")]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise LaunchError(f"sbatch has rejected the job array: {finished.stderr.strip()}")
    return finished.stdout.strip().split(";")[0]
