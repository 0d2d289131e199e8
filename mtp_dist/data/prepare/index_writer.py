"""Megatron-core's own writer of the indexed format. Its import takes seconds: nothing but `prepare` does it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # which optional packages Megatron-core could not find
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_index(file: Path, lengths: NDArray[np.int32], dtype: type[np.generic]) -> None:
    """Write `file`, an .idx, for documents of these lengths (tokens) one after the other in a .bin of this dtype."""
    # The tokens are in their file already: the builder would copy each document three times on their way there.
    builder: Any = IndexedDatasetBuilder(os.devnull, dtype=dtype)
    builder.sequence_lengths = lengths
    builder.document_indices = np.arange(len(lengths) + 1)
    builder.finalize(str(file))
