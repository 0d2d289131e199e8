"""The order of the training samples: several corpora blended by weight, each shuffled anew every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.packing import PackedCorpus
from mtp_dist.data.shuffling import ROUNDS, Shuffle


class Blend:
    """Which source each sample comes from, so that any run of samples has the sources in proportion."""

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` are positive and need not sum to 1."""
        assert min(weights) > 0
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of samples first .. first + count - 1: the source, and how many earlier samples come from it; [count]."""
        skipped, sources = self._merge(first, count)
        occurrences = np.empty_like(sources)
        for source, number in enumerate(skipped):
            from_it = sources == source
            occurrences[from_it] = number + np.arange(from_it.sum())
        window = slice(first - int(skipped.sum()), None)
        return sources[window], occurrences[window]

    def counts(self, num_samples: int) -> NDArray[np.int64]:
        """How many of the first `num_samples` samples come from each source."""
        skipped, sources = self._merge(num_samples, 0)
        counts: NDArray[np.int64] = skipped + np.bincount(sources, minlength=len(self.shares))
        return counts

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


class BlendedSamples:
    """Sample i = (step - 1) * global batch size + position in the batch, of corpora that can be read anywhere.

    A sample depends on the corpora, the weights, the seed and i: not on the layout, on what was read before, or on how
    long the run is, so that it can go on at another layout or be prolonged.
    """

    def __init__(self, corpora: Sequence[PackedCorpus], weights: Sequence[float], seed: int) -> None:
        assert len(corpora) == len(weights) > 0
        self.corpora = tuple(corpora)
        self.blend = Blend(weights)
        self.seed = seed
        self._orders: dict[int, tuple[int, Shuffle]] = {}

    def read(self, first: int, count: int) -> NDArray[np.int64]:
        """Samples number first .. first + count - 1, [count, S + lookahead]. Raises ConfigError for a file cut off."""
        for corpus in self.corpora:
            corpus.check_file()
        samples = np.empty((count, self.corpora[0].sample_length), dtype=np.int64)
        for sample, source, occurrence in zip(samples, *self.blend.locate(first, count), strict=True):
            epoch, position = divmod(int(occurrence), len(self.corpora[source]))
            sample[:] = self.corpora[source].tokens_of(self._order(source, epoch)[position])
        return samples

    def epochs(self, num_samples: int) -> list[float]:
        """How many times each corpus has been read after the first `num_samples` samples."""
        counts = self.blend.counts(num_samples)
        return [float(count / len(corpus)) for count, corpus in zip(counts, self.corpora, strict=True)]

    def state(self) -> None:
        """Nothing: a sample's number says which it is."""

    def restore(self, state: Any, samples_read: int) -> None:
        """Nothing either."""

    def _order(self, source: int, epoch: int) -> Shuffle:
        """Of a source's samples in one epoch; the last one of each source is kept."""
        if self._orders.get(source, (None,))[0] != epoch:
            # Raw bits, because NumPy keeps those the same in every version.
            keys = np.random.PCG64([self.seed, source, epoch]).random_raw(ROUNDS)
            self._orders[source] = (epoch, Shuffle(len(self.corpora[source]), keys.tolist()))
        return self._orders[source][1]
