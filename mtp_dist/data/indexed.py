"""Megatron-core's indexed format: PREFIX.bin holds the tokens, PREFIX.idx the lengths and offsets of the documents.

Megatron-core's builder writes it. It is read here because importing Megatron-core's datasets takes seconds before the
ranks have chosen their devices, and because its reader does not validate the files.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the token dtype, number of sequences, number of document boundaries."""
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


@dataclass(frozen=True)
class Index:
    """A validated .idx file as memory-mapped arrays."""

    dtype: np.dtype[Any]
    """Dtype of the tokens."""
    lengths: NDArray[np.int32]
    """Tokens per sequence; a document has one sequence or several."""
    pointers: NDArray[np.int64]
    """Byte offset of each sequence in PREFIX.bin."""
    boundaries: NDArray[np.int64]
    """Document d consists of the sequences boundaries[d] .. boundaries[d + 1] - 1."""
    tokens: int
    """Sum of `lengths`."""

    def first_token(self, sequence: int) -> int:
        """Return the index of a sequence's first token; the number of tokens for the one after the last sequence."""
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self.pointers) else self.tokens


def read_index(file: Path) -> Index:
    """Map and validate an .idx file. Raise DataError if it is damaged."""
    with file.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{file} is not a valid .idx file (its header MMIDIDX is missing): prepare it again")
    _, version, code, sequences, num_boundaries = HEADER.unpack(header)
    if version != 1 or code not in TYPES:
        raise DataError(f"{file}: version {version} or dtype {code} of its header is unknown: prepare it again")
    dtype: np.dtype[Any] = np.dtype(TYPES[code])
    if dtype.kind not in "iu":
        raise DataError(f"{file} lists {dtype} numbers, which are not token ids: name a corpus of tokens")
    expected = HEADER.size + sequences * (4 + 8) + num_boundaries * 8
    if (size := file.stat().st_size) != expected:
        raise DataError(
            f"{file} has {size} bytes, {expected} are needed for the {sequences} sequences and {num_boundaries} "
            "document boundaries of its header: it is truncated or corrupt, copy or prepare it again"
        )
    return _checked(file, dtype, sequences, num_boundaries)


def _checked(file: Path, dtype: np.dtype[Any], sequences: int, num_boundaries: int) -> Index:
    content = np.memmap(file, mode="r", dtype=np.uint8)
    at_pointers = HEADER.size + 4 * sequences
    at_boundaries = at_pointers + 8 * sequences
    lengths = content[HEADER.size : at_pointers].view(np.int32)
    pointers = content[at_pointers:at_boundaries].view(np.int64)
    boundaries = content[at_boundaries:].view(np.int64)
    tokens = int(lengths.sum(dtype=np.int64))
    if sequences:
        last_end = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
        if pointers[0] != 0 or last_end != tokens * dtype.itemsize or lengths.min() < 0:
            raise DataError(
                f"{file} contradicts itself: its lengths add up to {tokens * dtype.itemsize} bytes of tokens, its "
                f"last sequence ends at byte {last_end}; it is corrupt, copy or prepare it again"
            )
    if (
        not num_boundaries
        or boundaries[0] != 0
        or boundaries[-1] != sequences
        or (boundaries[1:] < boundaries[:-1]).any()
    ):
        raise DataError(
            f"{file}: its document boundaries do not rise from 0 to its {sequences} sequences: it is corrupt, copy or "
            "prepare it again"
        )
    return Index(dtype, lengths, pointers, boundaries, tokens)
