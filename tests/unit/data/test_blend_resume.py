"""A blend that changes over a resume: each source continues with what is unread of its epoch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtp_dist.config import Config
from mtp_dist.data.blending import BlendedSamples
from mtp_dist.data.datasets import Datasets, load_datasets
from mtp_dist.data.samples import PackedCorpus
from mtp_dist.data.tokenizer import Tokenizer
from tests.tiny import tiny_config

SOURCE_TOKENS = 1000
"""Tokens of source number j lie from j * SOURCE_TOKENS on, each of them once."""


class Phase(NamedTuple):
    """A run between two resumes."""

    weights: dict[int, float]
    """By source."""
    sequence_length: int
    lookahead: int
    seed: int
    num_samples: int


def datasets_of(phase: Phase, sizes: Sequence[int]) -> Datasets:
    corpora = [
        PackedCorpus(j * SOURCE_TOKENS + np.arange(sizes[j]), phase.sequence_length, phase.lookahead)
        for j in phase.weights
    ]
    samples = BlendedSamples(corpora, list(phase.weights.values()), phase.seed)
    names = tuple(map(str, phase.weights))
    return Datasets(cast(Tokenizer, None), samples, names, tuple(f"fingerprint of {name}" for name in names), ())


def resumed(phase: Phase, sizes: Sequence[int], state: Any) -> tuple[Datasets, int]:
    datasets = datasets_of(phase, sizes)
    return datasets, datasets.restore(state, may_change=True) if state else 0


def state_of(datasets: Datasets, samples_read: int) -> Any:
    return json.loads(json.dumps(datasets.state(samples_read, datasets.train.state())))


def tokens_read(phases: Sequence[Phase], sizes: Sequence[int]) -> list[list[list[int]]]:
    """By phase, the positions' tokens of each sample: what the heads only read ahead is left out."""
    state, by_phase = None, []
    for phase in phases:
        datasets, first = resumed(phase, sizes, state)
        samples = datasets.train.read(first, phase.num_samples)
        by_phase.append(samples[:, : phase.sequence_length].tolist())
        state = state_of(datasets, first + phase.num_samples)
    return by_phase


def source_of(sample: list[int]) -> int:
    return sample[0] // SOURCE_TOKENS


@pytest.mark.parametrize("change", ["weight", "source", "sequence_length", "seed"])
def test_what_was_read_is_not_repeated_before_the_rest_is_read(change: str) -> None:
    sizes = [961, 961, 961]
    before = Phase({0: 1.0, 1: 1.0}, 2, 1, 7, 100)
    weights = {"weight": {0: 1.0, 1: 9.0}, "source": {1: 1.0, 2: 1.0}}.get(change, before.weights)
    length = 4 if change == "sequence_length" else 2
    after = Phase(weights, length, 1, 8 if change == "seed" else 7, 100)
    first, second = tokens_read([before, after], sizes)
    earlier = {token for sample in first for token in sample}
    repeated = [sample for sample in second if earlier.intersection(sample)]
    assert not repeated, f"{len(repeated)} of {len(second)} samples, although most of each source was unread"
    assert {source_of(sample) for sample in second} == set(weights)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Phase], list[int]]:
    """Phases of which each changes anything, and the sources' sizes."""
    sizes = draw(st.lists(st.integers(12, 90), min_size=3, max_size=3))
    weights = st.dictionaries(st.integers(0, 2), st.sampled_from([0.3, 1.0, 2.0, 5.0]), min_size=1)
    kinds = st.builds(Phase, weights, st.integers(1, 8), st.integers(1, 3), st.integers(0, 1), st.integers(1, 40))
    return draw(st.lists(kinds, min_size=1, max_size=6)), sizes


@settings(max_examples=200, deadline=None)
@given(runs())
@example(([Phase({0: 1.0, 1: 1.0}, 2, 1, 0, 40), Phase({0: 1.0, 1: 3.0}, 2, 1, 0, 20)], [90, 90, 12]))
def test_every_epoch_has_each_token_once_whatever_changes(run: tuple[list[Phase], list[int]]) -> None:
    """But for fewer tokens at its end than fill one sample."""
    phases, sizes = run
    # By source, what may have been read of its epoch: a sample of what an epoch leaves out begins the next one, too.
    seen: dict[int, list[frozenset[int]]] = {}
    fill_one: dict[int, int] = {}  # tokens that do, since the source was last read
    for phase, samples in zip(phases, tokens_read(phases, sizes), strict=True):
        needed = phase.sequence_length + phase.lookahead
        fill_one = {source: max(needed, fill_one.get(source, 0)) for source in phase.weights}
        # A source that was left out and comes back is a new one.
        seen = {source: seen.get(source, [frozenset()]) for source in phase.weights}
        for sample in map(frozenset, samples):
            source = min(sample) // SOURCE_TOKENS
            assert max(sample) // SOURCE_TOKENS == source and len(sample) == phase.sequence_length
            continued = {before | sample for before in seen[source] if before.isdisjoint(sample)}
            begun = {sample for before in seen[source] if sizes[source] - len(before) < fill_one[source]}
            unread = sizes[source] - len(max(seen[source], key=len))
            assert continued | begun, f"a repetition while {unread} tokens of the epoch were unread"
            seen[source], fill_one[source] = list(continued | begun), needed
        total = sum(phase.weights.values())
        for source, weight in phase.weights.items():
            share = sum(source_of(sample) == source for sample in samples)
            assert abs(share - phase.num_samples * weight / total) <= len(phase.weights) / 2 + 1


@settings(deadline=None)
@given(runs(), st.integers(0, 30), st.integers(0, 30))
def test_a_resume_without_changes_changes_nothing(run: tuple[list[Phase], list[int]], more: int, count: int) -> None:
    """Neither in the first phase nor in a later one, and not from a state without positions."""
    phases, sizes = run
    state, first = None, 0
    for phase in phases:
        datasets, first = resumed(phase, sizes, state)
        first += phase.num_samples
        state = state_of(datasets, first)
    expected = datasets.train.read(first + more, count)
    again, _ = resumed(phases[-1], sizes, state_of(datasets, first + more))
    assert np.array_equal(again.train.read(first + more, count), expected)
    if len(phases) == 1:
        without, _ = resumed(phases[-1], sizes, state | {"read": first + more, "train": None})
        assert np.array_equal(without.train.read(first + more, count), expected)


def test_samples_after_a_longer_sequence_length_keep_neighbours_together() -> None:
    """Unread samples that follow each other in the corpus stay one text."""
    [_, samples] = tokens_read([Phase({0: 1.0}, 2, 1, 0, 10), Phase({0: 1.0}, 8, 1, 0, 110)], [901])
    jumps = sum(np.count_nonzero(np.diff(sample) != 1) for sample in samples)
    assert jumps <= 10, "one where each of the 10 samples lay that were read"


def test_a_checkpoint_without_positions_implies_them(tmp_path: Path) -> None:
    """From its configuration."""
    from mtp_dist.data.datasets import with_positions

    rising = [*range(32, 127), *range(128, 250)]  # text in an old encoding, as it has no control characters
    (tmp_path / "rising.txt").write_bytes(bytes(rising))
    (tmp_path / "falling.txt").write_bytes(bytes(reversed(rising)))

    def config(*weights: float) -> Config:
        names = ("rising.txt", "falling.txt")
        sources = [{"path": str(tmp_path / name), "weight": w} for name, w in zip(names, weights, strict=True)]
        return tiny_config(data={"train": sources})

    before, after = load_datasets(config(1.0, 1.0)), load_datasets(config(1.0, 4.0))
    state = before.state(8, None)
    after.restore(with_positions(state, config(1.0, 1.0)), may_change=False)
    earlier, later = before.train.read(0, 8)[:, :16], after.train.read(8, 10)[:, :16]
    assert len({tuple(sample) for sample in (*earlier, *later)}) == 18
    assert sum(sample[0] > sample[1] for sample in later) == 8, "the new weights count"
    assert with_positions(saved := state_of(after, 18), config(1.0, 1.0)) == saved
