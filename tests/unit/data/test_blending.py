from collections.abc import Sequence
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.data.blending import Blend, BlendedSamples
from mtp_dist.data.samples import PackedCorpus

SEQUENCE_LENGTH, HEADS = 2, 1

weight_lists = st.lists(st.floats(0.001, 100) | st.integers(1, 4).map(float), min_size=1, max_size=6)


def corpus(num_samples: int, first_token: int = 0) -> PackedCorpus:
    """A corpus whose samples begin with the tokens first_token + 0, 2, 4, ..."""
    tokens = np.arange(first_token, first_token + num_samples * SEQUENCE_LENGTH + HEADS, dtype=np.uint16)
    return PackedCorpus(tokens, SEQUENCE_LENGTH, HEADS)


def blended(weights: Sequence[float], seed: int = 1, sizes: Sequence[int] | None = None) -> BlendedSamples:
    corpora = [corpus(size, 1000 * j) for j, size in enumerate(sizes or [5] * len(weights))]
    return BlendedSamples(corpora, weights, seed)


def first_tokens(samples: BlendedSamples, indices: Sequence[int]) -> list[int]:
    return [int(samples.read(i, 1)[0, 0]) for i in indices]


@given(weight_lists, st.integers(1, 300))
def test_the_assignment_is_the_merge_of_ideal_places(weights: list[float], count: int) -> None:
    blend = Blend(weights)
    merged = sorted(((k + 0.5) / share, source, k) for source, share in enumerate(blend.shares) for k in range(count))[
        :count
    ]
    assert list(zip(*map(list, blend.locate(0, count)), strict=True)) == [(source, k) for _, source, k in merged]


@given(weight_lists, st.integers(0, 10**9))
def test_any_window_keeps_the_proportions_and_leaves_no_sample_out(weights: list[float], start: int) -> None:
    blend = Blend(weights)
    located = list(zip(*map(list, blend.locate(start, 50)), strict=True))
    for source, share in enumerate(blend.shares):
        occurrences = [k for j, k in located if j == source]
        assert (np.diff(occurrences) == 1).all()
        assert abs(len(occurrences) - 50 * share) <= len(weights) + 2, "either end may be off by half of it"
        assert all(abs(k - i * share) <= len(weights) / 2 + 1 for i, (j, k) in enumerate(located, start) if j == source)


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 2**40))
def test_every_epoch_visits_each_sample_once(size: int, epoch: int, seed: int) -> None:
    samples = blended([1.0], seed, [size])
    visited = first_tokens(samples, range(epoch * size, (epoch + 1) * size))
    assert sorted(visited) == list(range(0, 2 * size, 2))


def test_epochs_seeds_and_sources_are_shuffled_differently() -> None:
    one = blended([1.0], sizes=[50])
    epochs = [first_tokens(one, range(50 * epoch, 50 * (epoch + 1))) for epoch in range(3)]
    epochs.append(first_tokens(blended([1.0], seed=2, sizes=[50]), range(50)))
    two = blended([1.0, 1.0], sizes=[50, 50])
    epochs.append([token - 1000 for token in first_tokens(two, range(1, 100, 2))])
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert epochs[0] != sorted(epochs[0])


@given(weight_lists, st.randoms(use_true_random=False))
def test_a_sample_does_not_depend_on_the_order_of_access(weights: list[float], random: Random) -> None:
    indices = list(range(60))
    forward = first_tokens(blended(weights), indices)
    random.shuffle(indices)
    shuffled = first_tokens(blended(weights), indices)
    assert shuffled == [forward[i] for i in indices]


def test_the_order_is_the_one_committed_here() -> None:
    """A change would silently alter every run that goes on from a checkpoint."""
    samples = blended([3.0, 1.0], sizes=[4, 3])
    assert first_tokens(samples, range(12)) == [6, 4, 1002, 2, 0, 6, 1000, 4, 0, 2, 1004, 4]


@given(weight_lists, st.integers(0, 10**6), st.integers(1, 9))
def test_samples_read_together_are_those_read_one_by_one(weights: list[float], first: int, count: int) -> None:
    samples = blended(weights, sizes=[7] * len(weights))
    one_by_one = [samples.read(index, 1) for index in range(first, first + count)]
    assert np.array_equal(samples.read(first, count), np.concatenate(one_by_one))


@given(weight_lists, st.integers(0, 500))
def test_epochs_count_what_was_read(weights: list[float], read: int) -> None:
    samples = blended(weights, sizes=[3] * len(weights))
    sources, _ = samples.blend.locate(0, read)
    assert samples.epochs(read) == [np.count_nonzero(sources == j) / 3 for j in range(len(weights))]
