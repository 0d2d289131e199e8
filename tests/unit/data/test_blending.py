"""The order of blended samples, in a run without changes and over resumes that change the blend."""

import json
from typing import NamedTuple

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtp_dist.data.blending import Blend, BlendedSamples
from mtp_dist.data.datasets import Datasets, load_datasets, with_positions
from mtp_dist.data.samples import PackedCorpus
from tests.unit.data.preparing import data_config

SOURCE_TOKENS = 1000
"""Tokens of source number j start at j * SOURCE_TOKENS, each of them once."""

weight_lists = st.lists(st.floats(0.001, 100) | st.integers(1, 4).map(float), min_size=1, max_size=6)


def blended(weights, seed=1, sizes=None):
    """Samples that advance by two tokens."""
    sizes = sizes or [5] * len(weights)
    tokens = [np.arange(j * SOURCE_TOKENS, j * SOURCE_TOKENS + 2 * size + 1) for j, size in enumerate(sizes)]
    return BlendedSamples([PackedCorpus(source_tokens, 2, 1) for source_tokens in tokens], weights, seed)


@given(weight_lists, st.integers(1, 300))
def test_blend_merges_the_sources_by_ideal_position(weights, count):
    blend = Blend(weights)
    ranks = [((k + 0.5) / fraction, source, k) for source, fraction in enumerate(blend.fractions) for k in range(count)]
    expected = [(source, k) for _, source, k in sorted(ranks)[:count]]
    assert list(zip(*map(list, blend.locate(0, count)), strict=True)) == expected


@given(weight_lists, st.integers(0, 10**9))
def test_any_window_keeps_the_proportions_and_skips_no_sample(weights, start):
    blend = Blend(weights)
    sources, occurrences = blend.locate(start, 50)
    for source, fraction in enumerate(blend.fractions):
        positions = np.flatnonzero(sources == source)
        assert (np.diff(occurrences[positions]) == 1).all()
        assert abs(len(positions) - 50 * fraction) <= len(weights) + 2, "either end may be off by half of it"
        assert (abs(occurrences[positions] - (start + positions) * fraction) <= len(weights) / 2 + 1).all()


def test_epochs_seeds_and_sources_are_shuffled_differently():
    epochs = blended([1.0], sizes=[50]).read(0, 150)[:, 0].reshape(3, 50).tolist()
    epochs.append(blended([1.0], seed=2, sizes=[50]).read(0, 50)[:, 0].tolist())
    epochs.append((blended([1.0, 1.0], sizes=[50, 50]).read(0, 100)[1::2, 0] - SOURCE_TOKENS).tolist())
    assert len(set(map(tuple, epochs))) == 5 and epochs[0] != sorted(epochs[0])


def test_order_is_the_committed_one():
    """A change would silently alter every run that resumes from a checkpoint."""
    first_tokens = blended([3.0, 1.0], sizes=[4, 3]).read(0, 12)[:, 0].tolist()
    assert first_tokens == [6, 4, 1002, 2, 0, 6, 1000, 4, 0, 2, 1004, 4]
    first_tokens = blended([1.0], sizes=[1000]).read(0, 8)[:, 0].tolist()
    assert first_tokens == [1176, 1092, 1730, 1782, 1738, 122, 1748, 50]


@given(weight_lists, st.integers(0, 10**6), st.integers(1, 9), st.randoms(use_true_random=False))
def test_samples_do_not_depend_on_the_order_or_size_of_reads(weights, first, count, random):
    samples = blended(weights, sizes=[7] * len(weights))
    together = samples.read(first, count)
    indices = list(range(count))
    random.shuffle(indices)
    assert all(np.array_equal(samples.read(first + index, 1)[0], together[index]) for index in indices)
    slices = [samples.read(first, 2 * count, rank, 2) for rank in range(2)]
    assert np.array_equal(np.concatenate(slices), samples.read(first, 2 * count)), "in the order of the ranks"


@given(weight_lists, st.integers(0, 500))
def test_epochs_count_what_was_read(weights, read):
    samples = blended(weights, sizes=[3] * len(weights))
    sources, _ = samples.blend.locate(0, read)
    assert samples.epochs(read) == [np.count_nonzero(sources == j) / 3 for j in range(len(weights))]


class Phase(NamedTuple):
    """A run between two resumes; its weights are by source."""

    weights: dict[int, float]
    sequence_length: int
    lookahead: int
    seed: int
    num_samples: int


def resumed(phase, sizes, state):
    """Return a phase's datasets and the number of its first sample."""
    length, lookahead = phase.sequence_length, phase.lookahead
    corpora = [PackedCorpus(j * SOURCE_TOKENS + np.arange(sizes[j]), length, lookahead) for j in phase.weights]
    samples = BlendedSamples(corpora, list(phase.weights.values()), phase.seed)
    names = tuple(map(str, phase.weights))
    datasets = Datasets(None, samples, names, tuple(f"fingerprint of {name}" for name in names), (), ())
    return datasets, datasets.restore(state, may_change=True) if state else 0


def state_of(datasets, samples_read):
    return json.loads(json.dumps(datasets.state(samples_read, datasets.train.state())))


def tokens_read(phases, sizes):
    """Return each sample's tokens by phase, without the lookahead."""
    state, by_phase = None, []
    for phase in phases:
        datasets, first = resumed(phase, sizes, state)
        samples = datasets.train.read(first, phase.num_samples)
        by_phase.append(samples[:, : phase.sequence_length].tolist())
        state = state_of(datasets, first + phase.num_samples)
    return by_phase


# Runs of phases of which each may change anything, and the sources' sizes.
source_weights = st.dictionaries(st.integers(0, 2), st.sampled_from([0.3, 1.0, 2.0, 5.0]), min_size=1)
phases = st.builds(Phase, source_weights, st.integers(1, 8), st.integers(1, 3), st.integers(0, 1), st.integers(1, 40))
source_sizes = st.lists(st.integers(12, 90), min_size=3, max_size=3)
runs = st.tuples(st.lists(phases, min_size=1, max_size=6), source_sizes)


@settings(max_examples=200)
@given(runs)
@example(([Phase({0: 1.0, 1: 1.0}, 2, 1, 0, 40), Phase({0: 1.0, 1: 3.0}, 2, 1, 0, 20)], [90, 90, 12]))
@example(([Phase({0: 1.0, 1: 1.0}, 2, 1, 7, 100), Phase({1: 1.0, 2: 1.0}, 2, 1, 7, 100)], [961, 961, 961]))
@example(([Phase({0: 1.0, 1: 1.0}, 2, 1, 7, 100), Phase({0: 1.0, 1: 1.0}, 4, 1, 8, 100)], [961, 961, 961]))
def test_every_epoch_has_each_token_once_whatever_changes(run):
    """Except fewer tokens at its end than one sample has."""
    phases, sizes = run
    # By source, what may have been read of its epoch: a sample of what an epoch leaves out also starts the next one.
    seen, fill_one = {}, {}  # fill_one: tokens of a sample, since the source was last read
    for phase, samples in zip(phases, tokens_read(phases, sizes), strict=True):
        needed = phase.sequence_length + phase.lookahead
        fill_one = {source: max(needed, fill_one.get(source, 0)) for source in phase.weights}
        # A source that was left out and returns is a new one.
        seen = {source: seen.get(source, [frozenset()]) for source in phase.weights}
        for sample in map(frozenset, samples):
            source = min(sample) // SOURCE_TOKENS
            assert max(sample) // SOURCE_TOKENS == source and len(sample) == phase.sequence_length
            continued = {before | sample for before in seen[source] if before.isdisjoint(sample)}
            started = {sample for before in seen[source] if sizes[source] - len(before) < fill_one[source]}
            unread = sizes[source] - len(max(seen[source], key=len))
            assert continued | started, f"a repetition while {unread} tokens of the epoch were unread"
            seen[source], fill_one[source] = list(continued | started), needed
        total = sum(phase.weights.values())
        for source, weight in phase.weights.items():
            count = sum(sample[0] // SOURCE_TOKENS == source for sample in samples)
            assert abs(count - phase.num_samples * weight / total) <= len(phase.weights) / 2 + 1


@given(runs, st.integers(0, 30), st.integers(0, 30))
def test_resume_without_changes_changes_nothing(run, more, count):
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


def test_longer_samples_keep_unread_neighbours_together():
    [_, samples] = tokens_read([Phase({0: 1.0}, 2, 1, 0, 10), Phase({0: 1.0}, 8, 1, 0, 110)], [901])
    jumps = sum(np.count_nonzero(np.diff(sample) != 1) for sample in samples)
    assert jumps <= 10, "one for each of the 10 samples that were read"


def test_config_of_a_checkpoint_without_positions_implies_them(tmp_path):
    rising = [*range(32, 127), *range(128, 250)]  # text in a legacy encoding: it has no control characters
    (tmp_path / "rising.txt").write_bytes(bytes(rising))
    (tmp_path / "falling.txt").write_bytes(bytes(reversed(rising)))

    def config(*weights):
        sources = zip(("rising.txt", "falling.txt"), weights, strict=True)
        return data_config([{"path": str(tmp_path / name), "weight": weight} for name, weight in sources])

    before, after = load_datasets(config(1.0, 1.0)), load_datasets(config(1.0, 4.0))
    state = before.state(8, None)
    after.restore(with_positions(state, config(1.0, 1.0)), may_change=False)
    earlier, later = before.train.read(0, 8)[:, :8], after.train.read(8, 10)[:, :8]
    assert len({tuple(sample) for sample in (*earlier, *later)}) == 18
    assert sum(sample[0] > sample[1] for sample in later) == 8, "the new weights count"
    assert with_positions(saved := state_of(after, 18), config(1.0, 1.0)) == saved
