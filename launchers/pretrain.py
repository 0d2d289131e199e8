"""Pretraining under any launcher: `deepspeed`, `torchrun`, or one process with plain `python`."""

from mtp_dist.pretrain import main

if __name__ == "__main__":
    main()
