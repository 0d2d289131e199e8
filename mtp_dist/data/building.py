"""Megatron-core's own writer of the indexed format.

Its import takes seconds: nothing but `prepare` does it, and its workers share one.
"""

from __future__ import annotations

import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # which optional packages Megatron-core could not find
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


def new_builder(file: Path, vocab_size: int) -> IndexedDatasetBuilder:
    """Writes `file`, a .bin, as documents of ids below vocab_size."""
    return IndexedDatasetBuilder(str(file), dtype=DType.optimal_dtype(vocab_size))
