"""A random order that takes no memory, however many samples there are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_WORD = 2**64 - 1


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
        self.keys = [int(key) for key in keys]
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)

    def __getitem__(self, position: int) -> int:
        """What stands at that position, 0 <= position < size."""
        number = self._permute(position)
        while number >= self.size:
            number = self._permute(number)
        return number

    def range(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Return what stands at the positions start .. stop - 1."""
        numbers: NDArray[np.uint64] = self._permute(np.arange(start, stop, dtype=np.uint64))
        while len(beyond := np.flatnonzero(numbers >= self.size)):
            numbers[beyond] = self._permute(numbers[beyond])
        return numbers

    def _permute(self, number: Any) -> Any:
        """Permute an int, or each element of an array of uint64."""
        bits, mask = self.half_bits, (1 << self.half_bits) - 1
        left, right = number >> bits, number & mask
        for key in self.keys:
            mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & _WORD
            mixed = ((mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93) & _WORD
            left, right = right, left ^ ((mixed ^ (mixed >> 32)) & mask)
        return left << bits | right
