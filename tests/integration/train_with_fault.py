"""The training program, in which the rank `FAULTY_RANK` raises when it reads the samples of step 2."""

import os
from pathlib import Path

from mtp_dist.data.blending import BlendedSamples
from mtp_dist.pretrain import main

FIRST_SAMPLE_OF_STEP_2 = 8
read_sample = BlendedSamples.__getitem__


def read_or_raise(self, index):
    if os.environ["RANK"] == os.environ["FAULTY_RANK"] and index >= FIRST_SAMPLE_OF_STEP_2:
        Path("raised").touch()
        raise RuntimeError("this sample cannot be read")
    return read_sample(self, index)


if __name__ == "__main__":
    BlendedSamples.__getitem__ = read_or_raise
    main()
