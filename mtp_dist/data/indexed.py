"""Megatron-core's indexed format: PREFIX.bin has the tokens, PREFIX.idx the lengths and places of the documents.

Its own builder writes it. It is read here, because a run must not take seconds to import Megatron-core's datasets
before its ranks have chosen their devices, and because its reader trusts every file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the tokens' type, number of sequences, number of document boundaries."""
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


def add_suffix(prefix: Path, suffix: str) -> Path:
    """`PREFIX.bin` and its like; a prefix may have dots of its own."""
    return prefix.with_name(prefix.name + suffix)


@dataclass(frozen=True)
class Index:
    """A whole .idx file: memory-mapped arrays."""

    dtype: np.dtype[Any]
    """Of the tokens."""
    lengths: NDArray[np.int32]
    """Tokens of each sequence; a document is one sequence or several."""
    pointers: NDArray[np.int64]
    """Byte of the tokens' file at which each sequence begins."""
    boundaries: NDArray[np.int64]
    """Document d has the sequences boundaries[d] .. boundaries[d + 1] - 1."""
    tokens: int
    """The sum of `lengths`."""

    def first_token(self, sequence: int) -> int:
        """Return the number of a sequence's first token; of all tokens for the one after the last sequence."""
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self.pointers) else self.tokens


def read_index(file: Path) -> Index:
    """Raises ConfigError, naming the file and what is wrong with it."""
    with file.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ConfigError(f"{file} does not begin with the header of an index (MMIDIDX): it is no index or damaged")
    _, version, code, sequences, num_boundaries = HEADER.unpack(header)
    if version != 1 or code not in TYPES:
        raise ConfigError(f"{file}: its header has version {version} and type {code}, which are not known: damaged?")
    dtype: np.dtype[Any] = np.dtype(TYPES[code])
    if dtype.kind not in "iu":
        raise ConfigError(f"{file} speaks of {dtype} numbers, which are no token ids: give a corpus of tokens")
    expected = HEADER.size + sequences * (4 + 8) + num_boundaries * 8
    if (size := file.stat().st_size) != expected:
        raise ConfigError(
            f"{file} has {size} bytes, {expected} are needed for the {sequences} sequences and {num_boundaries} "
            "document boundaries of its header: it was cut off or damaged, copy or prepare it anew"
        )
    return _checked(file, dtype, sequences, num_boundaries)


def _checked(file: Path, dtype: np.dtype[Any], sequences: int, num_boundaries: int) -> Index:
    everything = np.memmap(file, mode="r", dtype=np.uint8)
    at_pointers = HEADER.size + 4 * sequences
    at_boundaries = at_pointers + 8 * sequences
    lengths = everything[HEADER.size : at_pointers].view(np.int32)
    pointers = everything[at_pointers:at_boundaries].view(np.int64)
    boundaries = everything[at_boundaries:].view(np.int64)
    tokens = int(lengths.sum(dtype=np.int64))
    if sequences:
        last_end = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
        if pointers[0] != 0 or last_end != tokens * dtype.itemsize or lengths.min() < 0:
            raise ConfigError(
                f"{file} disagrees with itself: its lengths add up to {tokens * dtype.itemsize} bytes of tokens, its "
                f"last sequence ends at byte {last_end}; it is damaged, copy or prepare it anew"
            )
    if (
        not num_boundaries
        or boundaries[0] != 0
        or boundaries[-1] != sequences
        or (boundaries[1:] < boundaries[:-1]).any()
    ):
        raise ConfigError(
            f"{file}: its document boundaries do not rise from 0 to its {sequences} sequences: it is damaged, copy or "
            "prepare it anew"
        )
    return Index(dtype, lengths, pointers, boundaries, tokens)
