"""The training program, whose sample at the end of the run takes longer than an impatient srun waits."""

import time

from mtp_dist import pretrain


def sample_for_long(*_: object) -> str:
    time.sleep(8)
    return "def f"


if __name__ == "__main__":
    pretrain._sample = sample_for_long
    pretrain.main()
