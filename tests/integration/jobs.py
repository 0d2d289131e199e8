"""Real jobs for the tests: a tiny configuration, the launchers' commands, and processes that cannot outlive a test."""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.integration.forks import Forked, Program

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PRETRAIN = str(ROOT / "launchers" / "pretrain.py")
FAULTY = str(ROOT / "tests" / "integration" / "faulty.py")
TIMEOUT_SECONDS = 600
"""Limit of one job: ten seconds on an idle machine, most of them imports, and minutes on a crowded one."""
MARK = "MTP_DIST_TEST_JOB"
"""Environment variable that identifies every process of a job, whatever its parent and process group."""


def write_corpus(folder, files=3, functions=60):
    """Write a folder of Python files, always the same ones."""
    draw = random.Random(0).randrange
    folder.mkdir(parents=True)
    for index in range(files):
        texts = [f"def f{draw(99)}(x, y):\n    return x * {draw(99)} + y\n\n" for _ in range(functions)]
        (folder / f"module_{index}.py").write_text("".join(texts))
    return folder


def write_config(folder, **sections):
    """Write `tiny.yaml` and its corpus; the run's folder is `folder/out`. sections: keys that replace the defaults."""
    corpus = write_corpus(folder / "corpus")
    values = {
        "run": {"name": "tiny", "device": "cpu", "output_dir": str(folder / "out")},
        "model": {"hidden_size": 32, "trunk_layers": 3, "num_attention_heads": 4, "num_query_groups": 2}
        | {"ffn_hidden_size": 64},
        "heads": {"count": 4},
        "data": {"train": [{"path": str(corpus)}], "validation": [{"path": str(corpus / "module_0.py")}]},
        "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 32}
        | {"precision": "fp32", "validate_every": 2, "validation_samples": 7},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "log": {"every": 1},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values | {name: values.get(name, {}) | keys for name, keys in sections.items()}))
    return path


def write_experiment(folder, arms, **changes):
    """Write `experiment.yaml`, whose runs have the tiny configuration, and return its path. arms: keys by name."""
    base = yaml.safe_load(write_config(folder).read_text())
    del base["run"]["name"], base["run"]["output_dir"], base["model"]["trunk_layers"], base["heads"]
    base["checkpoint"] = {"every": 2, "keep_last": 1}
    base["log"] = {"every": 1, "tensorboard": False}
    values = {
        "title": "Tiny",
        "question": "Does it run?",
        "paper": {"source": "none"},
        "base": base,
        "total_layers": 4,
        "grid": {"heads": arms},
        "seeds": [1],
        "metrics": ["loss"],
        "compare": {"axis": "heads", "baseline": "n=1", "metric": "loss"},
        "plot": {"metric": "loss", "x": "heads"},
        "output_dir": str(folder / "out"),
        "presets": {"small": changes},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


PORTS = range(10_000, 30_000)
"""Below Linux's ephemeral ports, so that no connection takes a port between the check and its use."""
PORTS_OF_A_WORKER = len(PORTS) // 10
_offsets = itertools.count(os.getpid())


def free_port():
    """Return a free port. Each of pytest's parallel workers has its own range and cycles through it."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    while True:
        port = PORTS[worker * PORTS_OF_A_WORKER + next(_offsets) % PORTS_OF_A_WORKER]
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("", port))
            return port


def plain(script, *arguments):
    """Return the command of one process without a launcher."""
    return [sys.executable, script, *arguments]


def deepspeed(*arguments, processes=2):
    """arguments: the script and its arguments, or `--module` first."""
    options = ["--quiet", "--num_gpus", str(processes), "--master_port", str(free_port())]
    return [str(BIN / "deepspeed"), *options, *arguments]


def torchrun(*arguments, processes=2):
    """arguments: the script and its arguments, or `-m` first."""
    options = ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [str(BIN / "torchrun"), *options, *arguments]


def forked(*arguments, processes=1):
    """Return ranks that need no launcher and no imports. arguments: the script and its arguments, or `-m` first."""
    return Program(arguments, processes, free_port())


def live_processes(is_ours):
    """Return every live process for which `is_ours` returns True."""
    alive = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if is_ours(process) and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def kill(processes):
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


class Job:
    """A running command with every process that it started."""

    def __init__(self, command, folder):
        self.mark = uuid.uuid4().hex
        self.started = time.monotonic()
        self._streams = [folder / f"{name}_{self.mark[:8]}.txt" for name in ("stdout", "stderr")]
        launcher_variables = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {name: value for name, value in os.environ.items() if name not in launcher_variables}
        environment |= {MARK: self.mark, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with self._streams[0].open("w") as stdout, self._streams[1].open("w") as stderr:
            if isinstance(command, Program):
                self.process = Forked(command, folder, environment, self._streams)
            else:
                streams = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": stderr}
                self.process = subprocess.Popen(command, cwd=folder, env=environment, **streams)

    stdout = property(lambda self: self._streams[0].read_text())
    stderr = property(lambda self: self._streams[1].read_text())
    output = property(lambda self: self.stdout + self.stderr)

    def processes(self):
        """Return every live process of the job."""
        return live_processes(self._has_started)

    def _has_started(self, process):
        if isinstance(self.process, Forked):  # its environment is that of the process it was forked from
            return any(one.pid in self.process.pids for one in (process, *process.parents()))
        return process.environ().get(MARK) == self.mark

    def rank(self, number):
        """Return the process of a rank."""
        if isinstance(self.process, Forked):
            return psutil.Process(self.process.pids[number])
        return next(p for p in self.processes() if p.environ().get("RANK") == str(number))

    def wait(self, seconds=TIMEOUT_SECONDS):
        """Return the exit status. Fail if the job does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job has not ended after {seconds} s:\n{self.output}") from None

    def wait_until(self, happened):
        """Wait until something has happened. Fail if the job ends first."""
        while not happened():
            assert self.process.poll() is None, f"the job has ended too early:\n{self.output}"
            assert time.monotonic() - self.started < TIMEOUT_SECONDS, f"the job does not get there:\n{self.output}"
            time.sleep(0.1)


@contextmanager
def started(command, folder, steps=0):
    """Start a job, wait until it has trained some steps, and kill all of its processes that run at the end."""
    job = Job(command, folder)
    try:
        job.wait_until(lambda: len(metrics(folder / "out")) >= steps)
        yield job
    finally:
        kill(job.processes())
        job.process.wait()


@dataclass(frozen=True)
class Result:
    status: int
    stdout: str
    stderr: str

    output = property(lambda self: self.stdout + self.stderr)


def run(command, status=None):
    """Run a command to its end in an empty folder. Fail if another status than the given one is returned."""
    with tempfile.TemporaryDirectory() as folder, started(command, Path(folder)) as job:
        result = Result(job.wait(), job.stdout, job.stderr)
    assert status in (None, result.status), result.output
    return result


def metrics(folder):
    """Return the complete lines of a run's `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def learned(folder):
    """Return the lines of `metrics.jsonl` without the scalars that differ between two runs of the same training."""
    measured = ("throughput/", "memory/")
    return [{name: value for name, value in line.items() if not name.startswith(measured)} for line in metrics(folder)]
