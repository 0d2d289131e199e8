"""The samples of one source: its tokens packed into samples, shuffled, epoch after epoch.

S is `train.sequence_length`; the lookahead is the largest prediction distance of the heads, n by default, or the
token-order window if that is larger. A resume with another sequence length or seed cuts the unread rest of the current
epoch in a new way, so one epoch may be cut into samples in several ways; later epochs are again cut as a whole.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.errors import DataError

ROUNDS = 6
"""Rounds of the Feistel network."""
WORD_MASK = 2**64 - 1
BLOCK = 1 << 12
"""Samples per block, for each of which the number of unread ones is stored."""
CHUNK = 1 << 20
"""Positions of a shuffle that are computed at once."""


class PackedCorpus:
    """Samples of S + lookahead tokens that advance by S: a head at distance d has the labels `sample[d : d + S]`.

    Over all samples these labels are the tokens d .. d + len(self) * S - 1, each of them once. Fewer than S tokens at
    the end are left out.
    """

    def __init__(self, tokens: Any, sequence_length: int, lookahead: int) -> None:
        """Pack an array of tokens, or an object that can be sliced like one. Raise DataError if no sample fits."""
        needed = sequence_length + lookahead
        if len(tokens) < needed:
            raise DataError(
                f"{len(tokens)} tokens are fewer than one sample needs, train.sequence_length + lookahead = "
                f"{sequence_length} + {lookahead} = {needed}: add text, lower train.sequence_length, or lower "
                "heads.prediction_distances or heads.token_order_window"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.lookahead = lookahead

    def __len__(self) -> int:
        return (len(self.tokens) - self.lookahead) // self.sequence_length

    @property
    def sample_length(self) -> int:
        """S + lookahead."""
        return self.sequence_length + self.lookahead

    def check_file(self) -> None:
        """Raise DataError if the file below memory-mapped tokens is shorter than when it was opened.

        Reading beyond its end would kill the process with SIGBUS, without a message. A deleted file keeps its content
        until it is closed.
        """
        stored = getattr(self.tokens, "stored", self.tokens)  # below tokens whose ids are checked
        if not isinstance(stored, np.memmap) or not isinstance(stored.base, mmap.mmap):
            return
        try:
            size = stored.base.size()
        except OSError as error:
            raise DataError(f"cannot read {stored.filename} any more ({error.strerror})") from None
        if size < stored.nbytes:
            raise DataError(
                f"{stored.filename} has {size} bytes, it had {stored.nbytes} when the run started: it was truncated or "
                "is being rewritten; restore it, then the same command resumes from the last checkpoint"
            )

    def sample_tokens(self, index: int) -> NDArray[Any]:
        """Return sample number `index`, [S + lookahead], in the corpus's own dtype."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.sequence_length
        tokens: NDArray[Any] = self.tokens[start : start + self.sample_length]
        return tokens

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.sample_tokens(index).astype(np.int64)


class Shuffle:
    """A pseudorandom permutation of 0 .. size - 1 that takes no memory.

    A Feistel network permutes the numbers of an even number of bits, at least as many as needed and fewer than four
    times as many as `size`; a number that it maps beyond `size` is mapped again until it is within (cycle walking:
    Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Integer arithmetic only, so the result is the same
    on every machine.
    """

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        """Permute by ROUNDS random 64-bit numbers."""
        assert size > 0 and len(keys) == ROUNDS
        self.size = size
        self.keys = [int(key) for key in keys]
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)

    def __getitem__(self, position: int) -> int:
        """Return the number at a position, 0 <= position < size."""
        number = self._permute(position)
        while number >= self.size:
            number = self._permute(number)
        return number

    def range(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Return the numbers at the positions start .. stop - 1."""
        numbers: NDArray[np.uint64] = self._permute(np.arange(start, stop, dtype=np.uint64))
        while len(beyond := np.flatnonzero(numbers >= self.size)):
            numbers[beyond] = self._permute(numbers[beyond])
        return numbers

    def _permute(self, number: Any) -> Any:
        """Permute an int, or each element of an array of uint64."""
        bits, mask = self.half_bits, (1 << self.half_bits) - 1
        left, right = number >> bits, number & mask
        for key in self.keys:
            mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & WORD_MASK
            mixed = ((mixed ^ (mixed >> 32)) * 0xD6E8FEB86659FD93) & WORD_MASK
            left, right = right, left ^ ((mixed ^ (mixed >> 32)) & mask)
        return left << bits | right


class UnreadTokens:
    """The tokens of a corpus without those of some samples, in their order, as an array that can be sliced.

    It takes one bit of memory per sample of the corpus.
    """

    def __init__(self, corpus: PackedCorpus, read: Iterable[NDArray[Any]]) -> None:
        """Leave out the samples whose numbers are in `read`. Tokens after the last sample are kept."""
        self._corpus = corpus
        unread = np.ones(-(-len(corpus) // BLOCK) * BLOCK, dtype=bool)
        unread[len(corpus) :] = False
        for samples in read:
            unread[samples.astype(np.int64)] = False
        self._unread = np.packbits(unread)
        self._before = np.concatenate([[0], np.cumsum(unread.reshape(-1, BLOCK).sum(axis=1))])
        """Unread samples before each block."""

    def __len__(self) -> int:
        read = len(self._corpus) - int(self._before[-1])
        return len(self._corpus.tokens) - read * self._corpus.sequence_length

    def __getitem__(self, part: slice) -> NDArray[Any]:
        """Return the tokens start .. stop - 1, which must exist."""
        length, start, pieces = self._corpus.sequence_length, part.start, []
        while start < part.stop:
            number, offset = divmod(start, length)
            if number < self._before[-1]:
                stop = min(part.stop, start - offset + length)
                first = self._find(number) * length + offset
            else:  # after the last sample
                stop, number = part.stop, int(self._before[-1])
                first = len(self._corpus) * length + start - number * length
            pieces.append(self._corpus.tokens[first : first + stop - start])
            start = stop
        return np.concatenate(pieces)

    def _find(self, number: int) -> int:
        """Return which sample of the corpus is unread sample `number`."""
        block = int(np.searchsorted(self._before, number, side="right")) - 1
        bits = np.unpackbits(self._unread[block * BLOCK // 8 : (block + 1) * BLOCK // 8])
        return block * BLOCK + int(np.flatnonzero(bits)[number - self._before[block]])


@dataclass(frozen=True)
class Cut:
    """One way to cut an epoch's tokens into shuffled samples, and how many of them were read.

    The first cut of an epoch covers all of its tokens, each further one those that the one before left unread.
    """

    sequence_length: int
    lookahead: int
    seed: int
    read: int = 0


@dataclass(frozen=True)
class Position:
    """The progress of reading a source."""

    order: int
    """Number of the source in the run: it makes the shuffles of the sources differ."""
    epoch: int
    """First epoch that `cuts` apply to."""
    cuts: tuple[Cut, ...]
    """Cuts of that epoch, each of what the one before left unread. The last one also cuts later epochs; if it is the
    only one, its `read` may count samples of these too."""

    @property
    def cut(self) -> Cut:
        return self.cuts[-1]

    def with_lookahead(self, lookahead: int) -> Position:
        """Return the same position with samples of another lookahead."""
        return replace(self, cuts=(*self.cuts[:-1], replace(self.cut, lookahead=lookahead)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cuts": [asdict(cut) for cut in self.cuts]}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Position:
        return cls(state["order"], state["epoch"], tuple(Cut(**cut) for cut in state["cuts"]))


class SourceSamples:
    """The samples of one source from a position on."""

    def __init__(self, tokens: Any, position: Position) -> None:
        """Cut an array of tokens. Raise DataError if no sample fits."""
        self._tokens = tokens
        self._corpus = PackedCorpus(tokens, position.cut.sequence_length, position.cut.lookahead)
        self._rest = _unread_epoch(tokens, position)
        if len(position.cuts) > 1 and self._rest is None:
            position = Position(position.order, position.epoch + 1, (position.cut,))
        self.position = position
        self._shuffle: tuple[int, Shuffle] | None = None

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Return the tokens of sample `number`, counted from the position on."""
        number += self.position.cut.read
        if self._rest is not None:
            if number < len(self._rest):
                return self._rest.sample_tokens(self._shuffled(self.position.epoch, self._rest)[number])
            number -= len(self._rest)
        ahead, number = divmod(number, len(self._corpus))
        return self._corpus.sample_tokens(self._shuffled(self._first_full_epoch + ahead, self._corpus)[number])

    def epochs(self, count: int) -> float:
        """Return how many times the source has been read after `count` samples from the position on."""
        count += self.position.cut.read
        if self._rest is not None and count < len(self._rest):
            unread = (len(self._rest) - count) * self._rest.sequence_length
            return self._first_full_epoch - unread / (len(self._corpus) * self._corpus.sequence_length)
        count -= len(self._rest) if self._rest is not None else 0
        return self._first_full_epoch + float(count / len(self._corpus))

    def after(self, count: int, cut: Cut) -> Position:
        """Return the position after `count` samples, from which on samples are cut by another cut."""
        here, count = self.position, count + self.position.cut.read
        if self._rest is None or count >= len(self._rest):
            count -= len(self._rest) if self._rest is not None else 0
            ahead, count = divmod(count, len(self._corpus))
            here = Position(here.order, self._first_full_epoch + ahead, (here.cut,))
        if self.is_cut_by(cut):
            cuts = (*here.cuts[:-1], replace(cut, read=count))
        else:
            cuts = (*here.cuts[:-1], *([replace(here.cut, read=count)] if count else []), cut)
        return replace(here, cuts=cuts)

    def is_cut_by(self, cut: Cut) -> bool:
        """Return whether a cut makes the same samples in the same order as the last one, however many were read.

        Another lookahead often makes the same samples.
        """
        current = self.position.cut
        if (cut.sequence_length, cut.seed) != (current.sequence_length, current.seed):
            return False
        corpora = [self._corpus] if self._rest is None else [self._corpus, self._rest]
        return all(_num_samples(corpus.tokens, cut) == len(corpus) for corpus in corpora)

    @property
    def _first_full_epoch(self) -> int:
        return self.position.epoch + (self._rest is not None)

    def _shuffled(self, epoch: int, corpus: PackedCorpus) -> Shuffle:
        """Return an epoch's order. The last one is cached."""
        if self._shuffle is None or self._shuffle[0] != epoch:
            cuts_before = len(self.position.cuts) - 1 if corpus is self._rest else 0
            shuffle = _shuffle(self.position.cut.seed, self.position.order, epoch, cuts_before, len(corpus))
            self._shuffle = epoch, shuffle
        return self._shuffle[1]


def _num_samples(tokens: Any, cut: Cut) -> int:
    return max(0, len(tokens) - cut.lookahead) // cut.sequence_length


def _unread_epoch(tokens: Any, position: Position) -> PackedCorpus | None:
    """Return what the last of several cuts applies to; None if no sample fits in it, or if it is the whole epoch."""
    if len(position.cuts) == 1:
        return None
    for number, (cut, following) in enumerate(pairwise(position.cuts)):
        corpus = PackedCorpus(tokens, cut.sequence_length, cut.lookahead)
        shuffle = _shuffle(cut.seed, position.order, position.epoch, number, len(corpus))
        read = (shuffle.range(start, min(start + CHUNK, cut.read)) for start in range(0, cut.read, CHUNK))
        tokens = UnreadTokens(corpus, read)
        if _num_samples(tokens, following) == 0:
            return None
    return PackedCorpus(tokens, position.cut.sequence_length, position.cut.lookahead)


def _shuffle(seed: int, order: int, epoch: int, cuts_before: int, size: int) -> Shuffle:
    # Raw bits, because NumPy keeps those the same in every version.
    keys = np.random.PCG64([seed, order, epoch, *([cuts_before] if cuts_before else [])]).random_raw(ROUNDS)
    return Shuffle(size, keys.tolist())
