"""A random order that takes no memory, however many samples there are."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_FIRST_FACTOR, _SECOND_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_HALF_A_WORD = np.uint64(32)


class Shuffle:
    """A pseudorandom permutation of 0 .. size - 1.

    A Feistel network permutes the numbers of an even number of bits, at least as many as needed and fewer than four
    times as many as `size`; a number that it sends beyond `size` is sent on until it comes back (cycle walking: Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains"). Integer arithmetic only, so it is the same everywhere.
    """

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        """`keys` are ROUNDS random numbers of 64 bits."""
        assert size > 0 and len(keys) == ROUNDS
        self.size = size
        self.keys = np.array(keys, dtype=np.uint64)
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at these positions, each 0 <= position < size."""
        numbers = self._permute(positions.astype(np.uint64))
        while (beyond := numbers >= self.size).any():
            numbers[beyond] = self._permute(numbers[beyond])
        return numbers.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits, mask = np.uint64(self.half_bits), np.uint64((1 << self.half_bits) - 1)
        left, right = numbers >> bits, numbers & mask
        for key in self.keys:
            # Products modulo 2^64, as NumPy's arrays have them.
            mixed = (right ^ key) * _FIRST_FACTOR
            mixed = (mixed ^ (mixed >> _HALF_A_WORD)) * _SECOND_FACTOR
            left, right = right, left ^ ((mixed ^ (mixed >> _HALF_A_WORD)) & mask)
        return left << bits | right
