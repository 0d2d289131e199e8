"""The training program, whose sample at the end of the run takes longer than an impatient srun waits."""

import os
import time

from mtp_dist.pretrain import main


def sample_for_long(*_: object) -> str:
    time.sleep(8)
    return "def f"


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    from mtp_dist import run

    run._sample = sample_for_long
    main()
