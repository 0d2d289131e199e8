"""The order of the training samples: several corpora blended by weight, each shuffled anew every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.packing import PackedCorpus


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
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample number `index`, [S + n]."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        source, occurrence = self.locate(index)
        epoch, position = divmod(occurrence, len(self.corpora[source]))
        return self.corpora[source][int(self._order(source, epoch)[position])]

    def locate(self, index: int) -> tuple[int, int]:
        """The source of sample `index`, and how many earlier samples come from that source.

        Occurrence k of a source with share w stands at (k + 1/2) / w, and the samples are all occurrences in the order
        of these places (the first source where they tie). `floor(w * x + 1/2)` occurrences lie up to x, over all m
        sources x - m/2 to x + m/2 of them: so start 2 m before `index` and sort the few that follow.
        """
        num_sources = len(self.shares)
        skipped = np.floor(self.shares * max(0, index - 2 * num_sources) + 0.5).astype(np.int64)
        occurrences = skipped[:, None] + np.arange(3 * num_sources + 1)
        places = (occurrences + 0.5) / self.shares[:, None]
        chosen = np.argsort(places, axis=None, kind="stable")[index - skipped.sum()]
        return int(chosen) // occurrences.shape[1], int(occurrences.flat[chosen])

    def _order(self, source: int, epoch: int) -> NDArray[np.int64]:
        """The permutation of a source's samples in one epoch; the last one of each source is kept.

        It sorts raw random bits because NumPy keeps those the same in every version, unlike `Generator.permutation`.
        """
        if self._orders.get(source, (None,))[0] != epoch:
            bits = np.random.PCG64([self.seed, source, epoch]).random_raw(len(self.corpora[source]))
            self._orders[source] = (epoch, np.argsort(bits, kind="stable"))
        return self._orders[source][1]
