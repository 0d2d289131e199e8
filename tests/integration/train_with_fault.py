"""The training program, in which the rank `FAULTY_RANK` raises when it reads the samples of step 2."""

import os
from pathlib import Path

from mtp_dist.data.blending import BlendedSamples
from mtp_dist.pretrain import main

FIRST_SAMPLE_OF_STEP_2 = 8
read_samples = BlendedSamples.read


def read_or_raise(self, first, *of_rank):
    if os.environ["RANK"] == os.environ["FAULTY_RANK"] and first >= FIRST_SAMPLE_OF_STEP_2:
        Path("raised").touch()
        raise RuntimeError("this sample cannot be read")
    return read_samples(self, first, *of_rank)


if __name__ == "__main__":
    BlendedSamples.read = read_or_raise
    main()
