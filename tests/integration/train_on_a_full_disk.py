"""The training program where no file may be larger than some text."""

import resource

from mtp_dist.checkpoint import saver
from mtp_dist.pretrain import main

ROOM = 40_000

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    saver.RETRY_DELAYS_S = (0.1,)
    main()
