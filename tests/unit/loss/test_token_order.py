"""The order of the upcoming tokens, against its definition written out."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtp_dist.loss.token_order import token_order_targets
from mtp_dist.model.targets import document_ids
from tests.unit.loss.harness import dense_distribution


def probabilities_by_definition(
    sample: list[int], position: int, window: int, vocab_size: int, end_of_document: int | None = None
) -> list[float]:
    """Softmax over the vocabulary of window - distance to a token's next occurrence, -inf where that is further or,
    where an end-of-document token is given, beyond it."""
    scores = []
    for token in range(vocab_size):
        ahead = [
            d
            for d in range(1, window + 1)
            if sample[position + d] == token and end_of_document not in sample[position : position + d]
        ]
        scores.append(window - ahead[0] if ahead else -math.inf)
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def test_by_hand() -> None:
    soft = token_order_targets(torch.tensor([[9, 5, 7, 5]]), 1, 3, torch.ones(1, 1, dtype=torch.bool))
    assert soft.token_ids.tolist() == [[5, 7, 5]] and soft.token_ids.dtype == torch.int64
    first = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(soft.probabilities, torch.tensor([[first, 1 - first, 0.0]]))


def test_nothing_is_ranked_beyond_the_document() -> None:
    samples = torch.tensor([[9, 5, 0, 7, 5]])
    documents = document_ids(samples, 0)
    soft = token_order_targets(samples, 3, 2, torch.tensor([[True, True, False]]), documents)
    first = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(soft.probabilities, torch.tensor([[first, 1 - first], [1.0, 0.0], [0.0, 0.0]]))


@given(
    vocab_size=st.integers(1, 6),
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    window=st.integers(1, 8),
    further=st.integers(0, 3),
    seed=st.integers(0, 999),
    end_of_document=st.sampled_from([None, 0]),
)
def test_equals_the_definition(
    vocab_size: int, batch: int, length: int, window: int, further: int, seed: int, end_of_document: int | None
) -> None:
    """`further`: tokens that only others read."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randint(0, vocab_size, (batch, length + window + further), generator=generator)
    valid = torch.rand(batch, length, generator=generator) < 0.7
    documents = None
    if end_of_document is not None:
        documents = document_ids(samples, end_of_document)
        valid &= samples[:, :length] != end_of_document
    soft = token_order_targets(samples, length, window, valid, documents)
    assert soft.token_ids.shape == soft.probabilities.shape == (length * batch, window)
    assert soft.probabilities.dtype == torch.float32
    expected: list[Tensor] = []
    for position in range(length):
        for sample, is_valid in zip(samples.tolist(), valid[:, position].tolist(), strict=True):
            truth = torch.zeros(vocab_size)
            if is_valid:
                truth += torch.tensor(
                    probabilities_by_definition(sample, position, window, vocab_size, end_of_document)
                )
            expected.append(truth)
    found = dense_distribution(*soft, vocab_size)
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-6, atol=1e-12)


def test_a_long_window_neither_overflows_nor_loses_mass() -> None:
    samples = torch.arange(300)[None]
    soft = token_order_targets(samples, 2, 200, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(soft.probabilities.sum(1), torch.ones(2))
    torch.testing.assert_close(soft.probabilities[0, :2], torch.tensor([1.0, math.exp(-1)]) * (1 - math.exp(-1)))
