"""The programs of the package with a fault: `python faulty.py FAULT ARGUMENTS...`."""

import os
import resource
import sys
import time
from pathlib import Path

from mtp_dist.pretrain import main

FIRST_SAMPLE_OF_STEP_2 = 8
LARGEST_FILE = 40_000


def unreadable_sample():
    """Let the rank FAULTY_RANK raise when it reads the samples of step 2."""
    from mtp_dist.data.blending import BlendedSamples

    read = BlendedSamples.read

    def read_or_raise(self, first, *of_rank):
        if os.environ["RANK"] == os.environ["FAULTY_RANK"] and first >= FIRST_SAMPLE_OF_STEP_2:
            Path("raised").touch()
            raise RuntimeError("this sample cannot be read")
        return read(self, first, *of_rank)

    BlendedSamples.read = read_or_raise


def nan_gradient():
    """Make one weight's gradient on rank 1 NaN from step 3 on."""
    from mtp_dist.engine.engine import TrainingEngine
    from mtp_dist.model.parameters import named_weights

    train_step, steps = TrainingEngine.train_step, []

    def train_step_with_nan(self, *args):
        steps.append(1)
        if len(steps) == 3 and self.topology.rank == 1:
            weight = dict(named_weights(self.stage))["heads.2.0.mlp.linear_fc1.weight"]
            weight.register_hook(lambda gradient: gradient * float("nan"))
        return train_step(self, *args)

    TrainingEngine.train_step = train_step_with_nan


def full_disk():
    """Limit the size of files to that of some text."""
    from mtp_dist.checkpoint import saver

    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    saver.RETRY_DELAYS_S = (0.1,)


def stopped_clock():
    """Stop the watchdog's clock until the file `hang` exists: on a slow machine, too, nothing takes too long before."""
    from mtp_dist.training import watchdog

    monotonic = watchdog.monotonic
    watchdog.monotonic = lambda: monotonic() if Path("hang").exists() else 0.0
    watchdog.GRACE_SECONDS = 600.0


def closed_output():
    """Make standard output a pipe without a reader, and standard error a closed terminal."""
    (reading, writing), (terminal, behind_it) = os.pipe(), os.openpty()
    os.dup2(writing, 1)
    os.dup2(behind_it, 2)
    os.close(reading)
    os.close(terminal)


def long_sample():
    """Let the sample at the end of the run take longer than an impatient srun waits."""
    from mtp_dist import run

    run._sample = lambda *_: time.sleep(8) or "def f"


def unreduced_norm():
    """Run `mtp-dist` with a norm that does not sum its weight's gradient over the tensor-parallel ranks."""
    import torch.nn.functional as F

    from mtp_dist import cli
    from mtp_dist.model.layers import RMSNorm

    RMSNorm.forward = lambda self, hidden, frozen=False: F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
    cli.main()


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"  # some faults import DeepSpeed before the device is selected
    fault = next(argument for argument in sys.argv if argument in globals())  # launchers put arguments before it
    sys.argv.remove(fault)
    globals()[fault]()
    main()
