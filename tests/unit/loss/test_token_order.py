"""The order of the upcoming tokens equals its definition."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.loss.token_order import token_order_targets
from mtp_dist.model.targets import document_ids
from tests.unit.loss.harness import dense_distribution

FIRST = 1 / (1 + math.exp(-1))
"""Probability of the nearer of two tokens."""


def definition(sample: list[int], position: int, window: int, vocab_size: int, end: int | None) -> list[float]:
    """Return the softmax over the vocabulary of window - distance to a token's next occurrence.

    The score is -inf if that is further away, or beyond an end-of-document token if one is given.
    """
    scores = []
    for token in range(vocab_size):
        ahead = [d for d in range(1, window + 1) if sample[position + d] == token]
        reached = ahead and end not in sample[position : position + ahead[0]]
        scores.append(math.exp(window - ahead[0]) if reached else 0.0)
    return [score / sum(scores) for score in scores]


def test_by_hand() -> None:
    soft = token_order_targets(torch.tensor([[9, 5, 7, 5]]), 1, 3, torch.ones(1, 1, dtype=torch.bool))
    assert soft.token_ids.tolist() == [[5, 7, 5]] and soft.token_ids.dtype == torch.int64
    torch.testing.assert_close(soft.probabilities, torch.tensor([[FIRST, 1 - FIRST, 0.0]]))


def test_nothing_is_ranked_beyond_the_document() -> None:
    samples = torch.tensor([[9, 5, 0, 7, 5]])
    valid = torch.tensor([[True, True, False]])
    soft = token_order_targets(samples, 3, 2, valid, document_ids(samples, 0))
    torch.testing.assert_close(soft.probabilities, torch.tensor([[FIRST, 1 - FIRST], [1.0, 0.0], [0.0, 0.0]]))


@given(
    vocab_size=st.integers(1, 6),
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    window=st.integers(1, 8),
    unread=st.integers(0, 3),
    seed=st.integers(0, 999),
    end=st.sampled_from([None, 0]),
)
def test_equals_the_definition(
    vocab_size: int, batch: int, length: int, window: int, unread: int, seed: int, end: int | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(0, vocab_size, (batch, length + window + unread), generator=generator)
    valid = torch.rand(batch, length, generator=generator) < 0.7
    documents = None
    if end is not None:
        documents = document_ids(samples, end)
        valid &= samples[:, :length] != end
    soft = token_order_targets(samples, length, window, valid, documents)
    assert soft.token_ids.shape == soft.probabilities.shape == (length * batch, window)
    assert soft.probabilities.dtype == torch.float32
    expected = [
        definition(sample, position, window, vocab_size, end) if valid[index, position] else [0.0] * vocab_size
        for position in range(length)
        for index, sample in enumerate(samples.tolist())
    ]
    found = dense_distribution(soft.token_ids, soft.probabilities, vocab_size)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_a_long_window_neither_overflows_nor_loses_mass() -> None:
    soft = token_order_targets(torch.arange(300)[None], 2, 200, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(soft.probabilities.sum(1), torch.ones(2))
    torch.testing.assert_close(soft.probabilities[0, :2], torch.tensor([1.0, math.exp(-1)]) * (1 - math.exp(-1)))
