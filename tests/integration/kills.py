"""A training whose ranks are killed and restarted until it has ended.

`python -m tests.integration.kills --kills 100 > docs/data/kills.json` counts the outcomes. The ranks are forked from a
process that has imported the packages, so that a start takes a second.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mtp_dist.provenance import provenance
from tests.integration import jobs

RANKS = 2
STEPS = 40
LIFETIME_S = 60
KEYS = ("checkpoint.every=2", "checkpoint.keep_last=2", "parallel.pipeline=2", "log.tensorboard=false")


@dataclass
class Counts:
    kills: int = 0
    during_a_save: int = 0
    """Kills while this start was writing a checkpoint."""
    starts: int = 0
    finished_runs: int = 0
    """Finished runs, each bitwise identical to the run without kills."""


class Training:
    """A run that is started as often as necessary."""

    def __init__(self, config, output_dir):
        self.output_dir, self.checkpoints = output_dir, output_dir / "checkpoints"
        self.started = 0.0
        keys = [f"run.output_dir={output_dir}", f"train.steps={STEPS}", *KEYS]
        self._arguments = [jobs.PRETRAIN, "--config", str(config), *keys]

    def start(self):
        self.started = time.time()
        return jobs.started(jobs.forked(*self._arguments, processes=RANKS), self.output_dir.parent)

    def is_saving(self):
        """Return whether the last start is writing a checkpoint; an earlier one may have left an unfinished one."""
        with suppress(FileNotFoundError):
            return any(path.stat().st_mtime > self.started for path in self.checkpoints.glob("*.unfinished"))
        return False

    def finish(self, job):
        """Wait for the run's end and return its metrics and the last checkpoint's tensors."""
        assert job.wait(LIFETIME_S) == 0, job.output[-5000:]
        files = sorted((self.checkpoints / f"step_{STEPS:08d}").glob("*.safetensors"))
        return jobs.learned(self.output_dir), {path.name: path.read_bytes() for path in files}


def wait_for_a_moment(training, job, numbers):
    """Wait for a random moment of the run, mostly during a save. A rank may have ended by then."""
    deadline = time.monotonic() + (4 * numbers.random() if numbers.random() < 0.3 else LIFETIME_S)
    saves = numbers.randrange(1, 4)
    while saves and time.monotonic() < deadline and job.process.poll() is None:
        if training.is_saving():
            saves -= 1
            time.sleep(0.05 * numbers.random())
        time.sleep(0.001)


def count_kills(folder, kills, seed):
    """Train in `folder` until that many kills were survived. Raise AssertionError if one was not."""
    config = jobs.write_config(folder)
    complete = Training(config, folder / "complete")
    with complete.start() as job:
        expected = complete.finish(job)
    numbers, counts = random.Random(seed), Counts()
    while counts.kills < kills:
        training = Training(config, folder / f"killed-{counts.finished_runs}")
        while True:
            with training.start() as job:
                counts.starts += 1
                if counts.kills < kills:
                    wait_for_a_moment(training, job, numbers)
                saving, victim = training.is_saving(), numbers.randrange(RANKS)
                if counts.kills < kills and len(job.processes()) == RANKS:
                    job.rank(victim).kill()
                    job.wait(LIFETIME_S)
                    counts.kills += 1
                    counts.during_a_save += saving
                else:
                    assert training.finish(job) == expected, f"{training.output_dir} differs from the run without kills"
                    break
        counts.finished_runs += 1
        print(counts, file=sys.stderr)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    with tempfile.TemporaryDirectory() as scratch:
        result = count_kills(Path(scratch), options.kills, options.seed)
    print(json.dumps({"measured": provenance(), **asdict(result), "ranks": RANKS, "steps": STEPS}))
