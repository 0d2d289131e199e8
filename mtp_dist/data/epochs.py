"""The samples of one source, epoch after epoch, each epoch in a new random order.

An epoch may be cut into samples in more than one way: a resume with another sequence length or seed cuts what is unread
of the epoch in progress anew. The epochs after it are whole again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.packing import PackedCorpus
from mtp_dist.data.shuffling import ROUNDS, Shuffle

BLOCK = 1 << 12
"""Samples whose unread ones are counted together."""
ROUND = 1 << 20
"""Positions of a shuffle that are computed at once."""


@dataclass(frozen=True)
class Cut:
    """One way to cut (the rest of) an epoch into shuffled samples, and how many of them were read."""

    sequence_length: int
    lookahead: int
    seed: int
    read: int = 0


@dataclass(frozen=True)
class Position:
    """How far a source has been read."""

    order: int
    """Number that tells the shuffles of this source from those of a run's other sources."""
    epoch: int
    """The first epoch that `cuts` apply to."""
    cuts: tuple[Cut, ...]
    """Of that epoch, each of what the one before left unread. The last one also cuts the epochs that follow; after a
    single cut `read` may count samples of these too."""

    @property
    def cut(self) -> Cut:
        """The last cut."""
        return self.cuts[-1]

    def with_lookahead(self, lookahead: int) -> Position:
        """Return the same position in samples that look further ahead, or less far."""
        return replace(self, cuts=(*self.cuts[:-1], replace(self.cut, lookahead=lookahead)))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self) | {"cuts": [asdict(cut) for cut in self.cuts]}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Position:
        """Return what `to_json` was called on."""
        return cls(state["order"], state["epoch"], tuple(Cut(**cut) for cut in state["cuts"]))


class SourceSamples:
    """The samples of one source from a position on."""

    def __init__(self, tokens: Any, position: Position) -> None:
        """Cut an array of tokens. Raise ConfigError if it does not fill a sample."""
        self._tokens = tokens
        self._corpus = PackedCorpus(tokens, position.cut.sequence_length, position.cut.lookahead)
        self._rest = _rest_of_epoch(tokens, position)
        if len(position.cuts) > 1 and self._rest is None:
            position = Position(position.order, position.epoch + 1, (position.cut,))
        self.position = position
        self._shuffle: tuple[int, Shuffle] | None = None

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Return the tokens of sample `number`, counted from the position on."""
        number += self.position.cut.read
        if self._rest is not None:
            if number < len(self._rest):
                return self._rest.tokens_of(self._shuffled(self.position.epoch, self._rest)[number])
            number -= len(self._rest)
        ahead, number = divmod(number, len(self._corpus))
        return self._corpus.tokens_of(self._shuffled(self._first_whole_epoch + ahead, self._corpus)[number])

    def epochs(self, count: int) -> float:
        """Return how many times the source has been read after `count` samples from the position on."""
        count += self.position.cut.read
        if self._rest is not None and count < len(self._rest):
            unread = (len(self._rest) - count) * self._rest.sequence_length
            return self._first_whole_epoch - unread / (len(self._corpus) * self._corpus.sequence_length)
        count -= len(self._rest) if self._rest is not None else 0
        return self._first_whole_epoch + float(count / len(self._corpus))

    def after(self, count: int, cut: Cut) -> Position:
        """Return the position after `count` samples from this one on, the samples from there on cut by another cut."""
        here, count = self.position, count + self.position.cut.read
        if self._rest is None or count >= len(self._rest):
            count -= len(self._rest) if self._rest is not None else 0
            ahead, count = divmod(count, len(self._corpus))
            here = Position(here.order, self._first_whole_epoch + ahead, (here.cut,))
        if self.is_cut_by(cut):
            cuts = (*here.cuts[:-1], replace(cut, read=count))
        else:
            cuts = (*here.cuts[:-1], *([replace(here.cut, read=count)] if count else []), cut)
        return replace(here, cuts=cuts)

    def is_cut_by(self, cut: Cut) -> bool:
        """Return whether a cut makes samples at the same places in the same order as the last one, whatever was read.

        Another lookahead need not change either.
        """
        ours = self.position.cut
        if (cut.sequence_length, cut.seed) != (ours.sequence_length, ours.seed):
            return False
        corpora = [self._corpus] if self._rest is None else [self._corpus, self._rest]
        return all(_num_samples(corpus.tokens, cut) == len(corpus) for corpus in corpora)

    @property
    def _first_whole_epoch(self) -> int:
        return self.position.epoch + (self._rest is not None)

    def _shuffled(self, epoch: int, corpus: PackedCorpus) -> Shuffle:
        """Return an epoch's order; the last one is kept."""
        if self._shuffle is None or self._shuffle[0] != epoch:
            cuts_before = len(self.position.cuts) - 1 if corpus is self._rest else 0
            shuffle = _shuffle(self.position.cut.seed, self.position.order, epoch, cuts_before, len(corpus))
            self._shuffle = epoch, shuffle
        return self._shuffle[1]


def _num_samples(tokens: Any, cut: Cut) -> int:
    return max(0, len(tokens) - cut.lookahead) // cut.sequence_length


def _rest_of_epoch(tokens: Any, position: Position) -> PackedCorpus | None:
    """Return what the last of several cuts has to cut; None if that is less than one sample, or the whole epoch."""
    if len(position.cuts) == 1:
        return None
    for number, (cut, following) in enumerate(pairwise(position.cuts)):
        corpus = PackedCorpus(tokens, cut.sequence_length, cut.lookahead)
        shuffle = _shuffle(cut.seed, position.order, position.epoch, number, len(corpus))
        read = (shuffle.range(start, min(start + ROUND, cut.read)) for start in range(0, cut.read, ROUND))
        tokens = UnreadTokens(corpus, read)
        if _num_samples(tokens, following) == 0:
            return None
    return PackedCorpus(tokens, position.cut.sequence_length, position.cut.lookahead)


def _shuffle(seed: int, order: int, epoch: int, cuts_before: int, size: int) -> Shuffle:
    # Raw bits, because NumPy keeps those the same in every version.
    keys = np.random.PCG64([seed, order, epoch, *([cuts_before] if cuts_before else [])]).random_raw(ROUNDS)
    return Shuffle(size, keys.tolist())


class UnreadTokens:
    """The tokens of a corpus without those of some samples, in their order, as an array that can be sliced.

    It takes a bit of memory per sample of the corpus.
    """

    def __init__(self, corpus: PackedCorpus, read: Iterable[NDArray[Any]]) -> None:
        """`read` are the numbers of the samples to leave out; what follows the last sample stays."""
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
        """Return the tokens start .. stop - 1, which must be there."""
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
        """Return which of the corpus's samples is the unread one number `number`."""
        block = int(np.searchsorted(self._before, number, side="right")) - 1
        bits = np.unpackbits(self._unread[block * BLOCK // 8 : (block + 1) * BLOCK // 8])
        return block * BLOCK + int(np.flatnonzero(bits)[number - self._before[block]])
