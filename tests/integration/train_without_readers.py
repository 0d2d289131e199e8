"""The training program whose standard output is a pipe without a reader, and its standard error a closed terminal."""

import os

from mtp_dist.pretrain import main

if __name__ == "__main__":
    reading, writing = os.pipe()
    terminal, behind_it = os.openpty()
    os.dup2(writing, 1)
    os.dup2(behind_it, 2)
    os.close(reading)
    os.close(terminal)
    main()
