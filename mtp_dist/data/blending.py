"""The order of the training samples: several corpora blended by weight, each reshuffled every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count as count_from
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.samples import Cut, PackedCorpus, Position, SourceSamples


class Blend:
    """The source of each sample: any range of samples has the sources in proportion to their weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Blend sources with positive sampling weights, which need not sum to 1."""
        assert min(weights) > 0
        self.fractions = np.array(weights, dtype=np.float64) / sum(weights)

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sources of samples first .. first + count - 1, and their numbers within their source; [count]."""
        skipped, sources = self._merge(first, count)
        occurrences = np.empty_like(sources)
        for source, number in enumerate(skipped):
            from_it = sources == source
            occurrences[from_it] = number + np.arange(from_it.sum())
        window = slice(first - int(skipped.sum()), None)
        return sources[window], occurrences[window]

    def counts(self, num_samples: int) -> NDArray[np.int64]:
        """Return how many of the first `num_samples` samples come from each source."""
        skipped, sources = self._merge(num_samples, 0)
        counts: NDArray[np.int64] = skipped + np.bincount(sources, minlength=len(self.fractions))
        return counts

    def _merge(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose a sample s <= first. Return how many samples of each source precede s, and the sources of the samples
        s .. first + count - 1.

        Occurrence k of a source with fraction w lies at (k + 1/2) / w; the samples are all occurrences sorted by
        position (the first source wins ties). `floor(w * x + 1/2)` occurrences lie up to x, over all m sources
        x - m/2 to x + m/2 of them: so start 2 m before `first` and sort the few that follow.
        """
        sources = len(self.fractions)
        skipped = np.floor(self.fractions * max(0, first - 2 * sources) + 0.5).astype(np.int64)
        occurrences = skipped[:, None] + np.arange(count + 3 * sources + 1)
        positions = (occurrences + 0.5) / self.fractions[:, None]
        order = np.argsort(positions, axis=None, kind="stable")[: first + count - skipped.sum()]
        return skipped, order // occurrences.shape[1]


def first_phase(weights: Sequence[float], cuts: Sequence[Cut]) -> dict[str, Any]:
    """Return the state of blended samples in the first phase: the part of a run before its data change at a resume."""
    return {"phase_start": 0, "weights": list(weights), "sources": [start.to_json() for start in _starts(cuts)]}


def _starts(cuts: Sequence[Cut]) -> list[Position]:
    return [Position(order, 0, (cut,)) for order, cut in enumerate(cuts)]


class BlendedSamples:
    """Sample i = (step - 1) * global batch size + index in the batch, from corpora with random access.

    A sample depends only on the corpora, weights, seed and i: not on the layout, on what was read before, or on the
    length of the run, so a run can resume at another layout and be extended. A resume with other sources, weights, seed
    or sequence length starts a new phase of the run, in which each source continues with the unread rest of its epoch.
    """

    def __init__(self, corpora: Sequence[PackedCorpus], weights: Sequence[float], seed: int) -> None:
        assert len(corpora) == len(weights) > 0
        self.corpora = tuple(corpora)
        self.weights = list(weights)
        self.blend = Blend(weights)
        self._cuts = [Cut(corpus.sequence_length, corpus.lookahead, seed) for corpus in corpora]
        self._begin_phase(0, _starts(self._cuts))

    shards = 1
    """Number of shards: every rank can read every sample."""

    def read(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> NDArray[np.int64]:
        """Return a rank's slice of the samples first .. first + count - 1, [count / ranks, S + lookahead].

        Raise DataError if a file was truncated or has an id outside the vocabulary.
        """
        count //= ranks
        first += rank * count
        for corpus in self.corpora:
            corpus.check_file()
        samples = np.empty((count, self.corpora[0].sample_length), dtype=np.int64)
        located = self.blend.locate(first - self._phase_start, count)
        for sample, source, occurrence in zip(samples, *located, strict=True):
            sample[:] = self._sources[source][int(occurrence)]
        return samples

    def epochs(self, num_samples: int) -> list[float]:
        """Return how many times each corpus has been read after the first `num_samples` samples."""
        counts = self.blend.counts(num_samples - self._phase_start)
        return [source.epochs(int(count)) for source, count in zip(self._sources, counts, strict=True)]

    def state(self) -> dict[str, Any]:
        """Return the phase as JSON: its first sample, its weights, and the position of each source at that sample."""
        positions = [source.position.to_json() for source in self._sources]
        return {"phase_start": self._phase_start, "weights": self.weights, "sources": positions}

    def restore(self, state: dict[str, Any] | None, samples_read: int, earlier: Sequence[int | None]) -> None:
        """Continue the phase of a state, if there is one, or start a new phase if anything differs.

        earlier: number of each source in the state, None if it is new.
        """
        if all(number is None for number in earlier):
            self._begin_phase(samples_read, _starts(self._cuts))
            return
        if state is None:
            return
        kept = {
            number: SourceSamples(corpus.tokens, Position.from_json(state["sources"][number]))
            for number, corpus in zip(earlier, self.corpora, strict=True)
            if number is not None
        }
        if (
            list(earlier) == list(range(len(state["sources"])))
            and np.array_equal(Blend(state["weights"]).fractions, self.blend.fractions)
            and all(kept[number].is_cut_by(cut) for number, cut in enumerate(self._cuts))
        ):
            positions = [kept[number].position.with_lookahead(cut.lookahead) for number, cut in enumerate(self._cuts)]
            self._begin_phase(state["phase_start"], positions)
            return
        read = Blend(state["weights"]).counts(samples_read - state["phase_start"])
        unused = count_from(1 + max(position["order"] for position in state["sources"]))
        self._begin_phase(
            samples_read,
            [
                Position(next(unused), 0, (cut,)) if number is None else kept[number].after(int(read[number]), cut)
                for number, cut in zip(earlier, self._cuts, strict=True)
            ],
        )

    def _begin_phase(self, first: int, positions: Sequence[Position]) -> None:
        """Start a phase at sample `first`, each source at its position."""
        self._phase_start = first
        self._sources = [
            SourceSamples(corpus.tokens, position) for corpus, position in zip(self.corpora, positions, strict=True)
        ]
