"""The order of the training samples: several corpora blended by weight, each shuffled anew every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.packing import PackedCorpus
from mtp_dist.data.shuffling import ROUNDS, Shuffle


class BlendedSamples:
    """Samples 0 .. num_samples - 1, where number i = step * global batch size + position in the batch.

    A sample depends on the corpora, the weights, the seed and i: not on the layout, on what was read before, or on
    num_samples, so that a run can go on at another layout or be prolonged.
    """

    def __init__(self, corpora: Sequence[PackedCorpus], weights: Sequence[float], seed: int, num_samples: int) -> None:
        """`weights` are positive, one for each corpus, and need not sum to 1."""
        assert len(corpora) == len(weights) > 0 and min(weights) > 0
        self.corpora = tuple(corpora)
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        self.seed = seed
        self.num_samples = num_samples
        self._orders: dict[int, tuple[int, Shuffle]] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample number `index`, [S + lookahead]."""
        return self.read(index, 1)[0]

    def read(self, first: int, count: int) -> NDArray[np.int64]:
        """Samples number first .. first + count - 1, [count, S + lookahead]."""
        if not 0 <= first <= first + count <= self.num_samples:
            raise IndexError(f"samples {first} to {first + count - 1} of {self.num_samples}")
        samples = np.empty((count, self.corpora[0].sample_length), dtype=np.int64)
        for sample, source, occurrence in zip(samples, *self.locate(first, count), strict=True):
            epoch, position = divmod(int(occurrence), len(self.corpora[source]))
            sample[:] = self.corpora[source].tokens_of(self._order(source, epoch)[position])
        return samples

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each of these samples, and how many earlier samples come from that source, [count] each."""
        skipped, sources = self._merge(first, count)
        occurrences = np.empty_like(sources)
        for source, number in enumerate(skipped):
            from_it = sources == source
            occurrences[from_it] = number + np.arange(from_it.sum())
        window = slice(first - int(skipped.sum()), None)
        return sources[window], occurrences[window]

    def epochs(self, num_samples: int) -> list[float]:
        """How many times each corpus has been read after the first `num_samples` samples."""
        skipped, sources = self._merge(num_samples, 0)
        read = skipped + np.bincount(sources, minlength=len(self.corpora))
        return [float(number / len(corpus)) for number, corpus in zip(read, self.corpora, strict=True)]

    def _merge(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How many samples of each source come before some sample at or before `first`, and the sources from there to
        sample first + count - 1.

        Occurrence k of a source with share w stands at (k + 1/2) / w, and the samples are all occurrences in the order
        of these places (the first source where they tie). `floor(w * x + 1/2)` occurrences lie up to x, over all m
        sources x - m/2 to x + m/2 of them: so start 2 m before `first` and sort the few that follow.
        """
        sources = len(self.shares)
        skipped = np.floor(self.shares * max(0, first - 2 * sources) + 0.5).astype(np.int64)
        occurrences = skipped[:, None] + np.arange(count + 3 * sources + 1)
        places = (occurrences + 0.5) / self.shares[:, None]
        order = np.argsort(places, axis=None, kind="stable")[: first + count - skipped.sum()]
        return skipped, order // occurrences.shape[1]

    def _order(self, source: int, epoch: int) -> Shuffle:
        """Of a source's samples in one epoch; the last one of each source is kept."""
        if self._orders.get(source, (None,))[0] != epoch:
            # Raw bits, because NumPy keeps those the same in every version.
            keys = np.random.PCG64([self.seed, source, epoch]).random_raw(ROUNDS)
            self._orders[source] = (epoch, Shuffle(len(self.corpora[source]), keys.tolist()))
        return self._orders[source][1]
