"""Megatron-core's own writer of the indexed format. Importing it takes seconds, so only `prepare` does."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about optional packages that Megatron-core does not find
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_index(file: Path, lengths: NDArray[np.int32], dtype: type[np.generic]) -> None:
    """Write the .idx `file` of a .bin with consecutive documents of these lengths in tokens."""
    # The tokens are in their file already; the builder would copy each document three times.
    builder: Any = IndexedDatasetBuilder(os.devnull, dtype=dtype)
    builder.sequence_lengths = lengths
    builder.document_indices = np.arange(len(lengths) + 1)
    builder.finalize(str(file))
