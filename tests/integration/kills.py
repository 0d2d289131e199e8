"""A training whose ranks are killed again and again, and started again until it has ended.

`python -m tests.integration.kills --kills 100 > docs/data/kills.json` counts what became of it. The ranks are forked
from a process that has the packages imported already, so that a start takes a second; from there on they run what
`launchers/pretrain.py` runs.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.integration import jobs

RANKS = 2
STEPS = 40
SECONDS_OF_A_LIFE = 60
SECONDS_FOR_THE_OTHERS = 1
"""What a launcher gives the ranks that live on."""
KEYS = ("checkpoint.every=2", "checkpoint.keep_last=2", "parallel.pipeline=2", "log.tensorboard=false")


@dataclass
class Counts:
    kills: int = 0
    during_a_save: int = 0
    """Kills that found a checkpoint unfinished that this start had begun."""
    starts: int = 0
    finished_runs: int = 0
    """Each equal to the run that nobody killed, to the last bit."""


def serve(rank: int, port: int, log: Path, arguments: Sequence[str]) -> None:
    """One rank's life."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    from mtp_dist.pretrain import main

    main(arguments)


class Training:
    """A run in a folder, started as often as it takes."""

    def __init__(self, config: Path, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.checkpoints = output_dir / "checkpoints"
        self.log = output_dir.with_suffix(".log")
        self.started = 0.0
        self._arguments = ["--config", str(config), f"run.output_dir={output_dir}", f"train.steps={STEPS}", *KEYS]

    def start(self) -> list[BaseProcess]:
        self.started = time.time()
        context = multiprocessing.get_context("forkserver")
        port = jobs.free_port()
        processes: list[BaseProcess] = [
            context.Process(target=serve, args=(rank, port, self.log, self._arguments)) for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        return processes

    def is_saving(self) -> bool:
        """Since its last start: a kill leaves what it found."""
        with suppress(FileNotFoundError):
            return any(path.stat().st_mtime > self.started for path in self.checkpoints.glob("*.unfinished"))
        return False

    def end(self, processes: Sequence[BaseProcess]) -> None:
        """Wait for a life that nobody ends. Raises where it fails."""
        for process in processes:
            process.join(SECONDS_OF_A_LIFE)
        if any(process.exitcode != 0 for process in processes):
            raise AssertionError(f"exit codes {[p.exitcode for p in processes]}:\n{self.log.read_text()[-5000:]}")

    def outcome(self) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """What was learned: the metrics, and the last checkpoint's tensors."""
        last = self.checkpoints / f"step_{STEPS:08d}"
        return jobs.learned(self.output_dir), {
            path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))
        }


def wait_for_the_moment(training: Training, processes: Sequence[BaseProcess], numbers: random.Random) -> None:
    """Some time in the life of a run, more often than not while it saves. May come when a rank has ended already."""
    deadline = time.monotonic() + SECONDS_OF_A_LIFE
    if numbers.random() < 0.3:
        deadline = time.monotonic() + 4 * numbers.random()
    saves = numbers.randrange(1, 4)
    while saves and time.monotonic() < deadline and all(process.is_alive() for process in processes):
        if training.is_saving():
            saves -= 1
            time.sleep(0.05 * numbers.random())
        time.sleep(0.001)


def kill_one(processes: Sequence[BaseProcess], numbers: random.Random) -> bool:
    """Kill a rank, and the others as a launcher does. False where the run has ended before."""
    victim = numbers.choice(processes)
    if any(process.exitcode is not None for process in processes):
        return False
    victim.kill()
    for process in processes:
        process.join(SECONDS_FOR_THE_OTHERS)
        with suppress(ValueError):
            process.kill()
        process.join()
    return True


def count_kills(folder: Path, kills: int, seed: int) -> Counts:
    """Train in `folder` until so many kills have been survived. Raises AssertionError where one was not."""
    multiprocessing.set_forkserver_preload(["mtp_dist.training.loop", "mtp_dist.training.reporting"])
    config = jobs.write_config(folder)
    whole = Training(config, folder / "whole")
    whole.end(whole.start())
    expected = whole.outcome()
    numbers, counts = random.Random(seed), Counts()
    training = Training(config, folder / "killed-0")
    while counts.kills < kills or not training.output_dir.joinpath("summary.json").exists():
        processes = training.start()
        counts.starts += 1
        if counts.kills < kills:
            wait_for_the_moment(training, processes, numbers)
            saving = training.is_saving()
            if kill_one(processes, numbers):
                counts.kills += 1
                counts.during_a_save += saving
                continue
        training.end(processes)
        assert training.outcome() == expected, f"{training.output_dir} has learned something else"
        counts.finished_runs += 1
        print(counts, file=sys.stderr)
        if counts.kills < kills:
            training = Training(config, folder / f"killed-{counts.finished_runs}")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    with tempfile.TemporaryDirectory() as scratch:
        result = count_kills(Path(scratch), options.kills, options.seed)
    print(json.dumps(asdict(result) | {"ranks": RANKS, "steps": STEPS}))
