"""The samples of a source: packed, shuffled, epoch after epoch."""

import itertools
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.data.blending import BlendedSamples
from mtp_dist.data.datasets import ValidationSamples
from mtp_dist.data.samples import ROUNDS, PackedCorpus, Shuffle
from mtp_dist.errors import DataError
from tests.unit.data.preparing import error_of


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 200))
def test_over_all_samples_each_head_predicts_each_token_once(sequence_length, heads, extra):
    tokens = np.arange(sequence_length + heads + extra, dtype=np.uint16)
    corpus = PackedCorpus(tokens, sequence_length, heads)
    samples = [corpus[i] for i in range(len(corpus))]
    covered = len(corpus) * sequence_length
    assert all(sample.shape == (sequence_length + heads,) and sample.dtype == np.int64 for sample in samples)
    for k in range(heads + 1):  # k = 0: the inputs
        labels = np.concatenate([sample[k : k + sequence_length] for sample in samples])
        assert labels.tolist() == list(range(k, k + covered))
    assert 0 <= len(tokens) - heads - covered < sequence_length
    for index in (-1, len(corpus)):
        with pytest.raises(IndexError):
            corpus[index]
    corpus[0][:] = 0
    assert corpus[0].tolist() == tokens[: sequence_length + heads].tolist(), "a sample is a copy"


def test_truncated_file_is_reported_before_it_is_read(tmp_path):
    """In training and validation: reading beyond its end would kill the process with SIGBUS."""
    tokens, file = np.arange(41, dtype=np.uint16), tmp_path / "corpus.bin"
    tokens.tofile(file)
    corpus = PackedCorpus(np.memmap(file, mode="r", dtype=np.uint16), 4, 1)
    training, validation = BlendedSamples([corpus], [1.0], 0), ValidationSamples(corpus, 5)
    expected = training.read(0, 10)
    assert expected.sum() > 0 and validation[0].tolist() == [0, 1, 2, 3, 4]
    os.truncate(file, 80)
    for read in (lambda: training.read(0, 1), lambda: validation[0]):
        assert f"{file} has 80 bytes, it had 82 when the run started" in error_of(DataError, read)
    tokens.tofile(file)
    for change in (lambda: os.truncate(file, 100), file.unlink):
        change()
        assert np.array_equal(training.read(0, 10), expected), "a file that grows or is deleted can be read"


@given(st.integers(1, 120), st.integers(1, 150))
def test_validation_samples_are_distinct_ordered_and_spread(size, wanted):
    samples = ValidationSamples(PackedCorpus(np.arange(size + 1, dtype=np.uint16), 1, 1), wanted)
    positions = [int(samples[i][0]) for i in range(len(samples))]
    assert len(positions) == min(wanted, size)
    gaps = np.diff([*positions, size])
    assert positions[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    for index in (-1, len(samples)):
        with pytest.raises(IndexError):
            samples[index]


keys = st.lists(st.integers(0, 2**64 - 1), min_size=ROUNDS, max_size=ROUNDS)


def shuffle(size, seed):
    return Shuffle(size, np.random.PCG64(seed).random_raw(ROUNDS).tolist())


@given(st.integers(1, 300), keys)
def test_shuffle_is_a_permutation(size, round_keys):
    order = Shuffle(size, round_keys)
    assert sorted(order[position] for position in range(size)) == list(range(size))
    assert order.range(0, size).tolist() == [order[position] for position in range(size)]


@given(st.integers(1, 2**40), keys, st.data())
def test_shuffle_of_any_size(size, round_keys, data):
    position, other = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    order = Shuffle(size, round_keys)
    assert 0 <= order[position] < size
    assert (order[position] == order[other]) == (position == other)


def test_all_orders_of_four_are_about_equally_likely():
    counts = Counter(tuple(order[i] for i in range(4)) for order in (shuffle(4, seed) for seed in range(24 * 400)))
    assert counts.keys() == set(itertools.permutations(range(4)))
    chi_squared = sum((count - 400) ** 2 / 400 for count in counts.values())
    assert chi_squared < 49.7, "exceeded once in a thousand by 23 degrees of freedom"


def test_neighbours_are_separated():
    size = 100_000
    numbers = shuffle(size, 3).range(0, size).astype(np.int64)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(np.arange(size), numbers)[0, 1]) < 0.015
    assert abs(np.diff(numbers)).mean() / size - 1 / 3 < 0.01
