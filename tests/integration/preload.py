"""The imports of a rank, for the process that `forks.py` forks ranks from."""

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

from mtp_dist.monitoring.output import silence_import_warnings

silence_import_warnings()

import mtp_dist.run  # noqa: E402, F401
