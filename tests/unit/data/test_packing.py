import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.data.blending import BlendedSamples
from mtp_dist.data.corpus import unigram_entropy
from mtp_dist.data.datasets import ValidationSamples
from mtp_dist.data.samples import PackedCorpus
from mtp_dist.errors import UserError

lengths = st.tuples(st.integers(1, 20), st.integers(1, 6), st.integers(0, 200))


@given(lengths)
def test_over_all_samples_each_head_predicts_each_token_once(drawn: tuple[int, int, int]) -> None:
    sequence_length, heads, extra = drawn
    tokens = np.arange(sequence_length + heads + extra, dtype=np.uint16)
    corpus = PackedCorpus(tokens, sequence_length, heads)
    samples = [corpus[i] for i in range(len(corpus))]
    covered = len(corpus) * sequence_length
    assert all(sample.shape == (sequence_length + heads,) and sample.dtype == np.int64 for sample in samples)
    for k in range(heads + 1):  # k = 0: the inputs
        labels = np.concatenate([sample[k : k + sequence_length] for sample in samples])
        assert labels.tolist() == list(range(k, k + covered))
    assert 0 <= len(tokens) - heads - covered < sequence_length


@given(lengths)
def test_there_is_no_sample_beyond_the_last(drawn: tuple[int, int, int]) -> None:
    sequence_length, heads, extra = drawn
    corpus = PackedCorpus(np.zeros(sequence_length + heads + extra, dtype=np.uint16), sequence_length, heads)
    for index in (-1, len(corpus)):
        with pytest.raises(IndexError):
            corpus[index]


def test_a_sample_is_a_copy() -> None:
    corpus = PackedCorpus(np.arange(6, dtype=np.uint16), 4, 2)
    corpus[0][:] = 0
    assert corpus[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_too_few_tokens_tell_how_many_are_needed() -> None:
    with pytest.raises(UserError, match=r"11 tokens are fewer than .* 8 \+ 4 = 12: add text, lower"):
        PackedCorpus(np.zeros(11, dtype=np.uint16), 8, 4)
    assert len(PackedCorpus(np.zeros(12, dtype=np.uint16), 8, 4)) == 1


def test_unigram_entropy_is_in_nats() -> None:
    assert unigram_entropy(np.ones(256, dtype=np.int64)) == pytest.approx(math.log(256))
    assert unigram_entropy(np.array([0, 3, 0, 1])) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert unigram_entropy(np.array([0, 9, 0])) == 0


def mapped(file: Path) -> PackedCorpus:
    """Ten samples of four tokens in a file."""
    np.arange(41, dtype=np.uint16).tofile(file)
    return PackedCorpus(np.memmap(file, mode="r", dtype=np.uint16), 4, 1)


def test_a_file_that_is_cut_off_is_named_before_it_is_read(tmp_path: Path) -> None:
    """In training and in validation. Whoever reads beyond its end is killed by SIGBUS."""
    file = tmp_path / "corpus.bin"
    corpus = mapped(file)
    training, validation = BlendedSamples([corpus], [1.0], 0), ValidationSamples(corpus, 5)
    assert training.read(0, 10).sum() > 0 and validation[0].tolist() == [0, 1, 2, 3, 4]
    os.truncate(file, 80)
    for read in (lambda: training.read(0, 1), lambda: validation[0]):
        with pytest.raises(UserError, match=rf"{file} has 80 bytes, it had 82 when the run started"):
            read()


def test_a_file_that_grows_or_is_deleted_is_read_on(tmp_path: Path) -> None:
    file = tmp_path / "corpus.bin"
    samples = BlendedSamples([mapped(file)], [1.0], 0)
    expected = samples.read(0, 10)
    os.truncate(file, 100)
    assert np.array_equal(samples.read(0, 10), expected)
    file.unlink()
    assert np.array_equal(samples.read(0, 10), expected)
