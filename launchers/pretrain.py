"""Pretraining under any launcher: `deepspeed`, `torchrun`, or one process with plain `python`."""

import faulthandler

from mtp_dist.pretrain import main

if __name__ == "__main__":
    faulthandler.enable()  # a rank that is ended by a signal such as SIGBUS prints its stack
    main()
