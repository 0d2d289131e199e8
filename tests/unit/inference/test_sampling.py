"""Continuations of a text."""

import pytest
import torch
from torch import Tensor

from mtp_dist.inference.sampling import sample_continuation
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import tiny_config

VOCAB_SIZE = 20
END_OF_DOCUMENT = 9
PROMPT = [3, 1, 4, 1, 5]


class WatchedModel(ReferenceModel):
    """Remembers what it was asked."""

    def __init__(self, **data: bool) -> None:
        sections = {"train": {"sequence_length": 8}, "model": {"init_std": 0.3, "vocab_size": VOCAB_SIZE}, "data": data}
        super().__init__(tiny_config(**sections))
        self.seen: list[list[int]] = []

    def next_token_logits(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens[0].tolist())
        return super().next_token_logits(tokens)


def continuation(model: WatchedModel, prompt: list[int], tokens: int, temperature: float, seed: int) -> list[int]:
    return sample_continuation(model, prompt, tokens, temperature, seed, END_OF_DOCUMENT)


@pytest.fixture(scope="module")
def model() -> WatchedModel:
    return WatchedModel()


def test_repeats_by_seed(model: WatchedModel) -> None:
    first, second, other = (continuation(model, PROMPT, 12, 1.0, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert len(first) == 12 and all(0 <= token < VOCAB_SIZE for token in first)
    torch.manual_seed(7)
    assert continuation(model, PROMPT, 12, 1.0, 1) == first, "the global generator does not matter"
    assert continuation(model, PROMPT, 5, 1.0, 1) == first[:5]


def test_sees_the_last_tokens_only(model: WatchedModel) -> None:
    prompt = list(PROMPT)
    model.seen.clear()
    text = prompt + continuation(model, prompt, 10, 1.0, 1)
    assert prompt == PROMPT, "the caller's list is untouched"
    assert model.seen == [text[max(0, end - 8) : end] for end in range(5, 15)]
    model.seen.clear()
    continuation(model, list(range(20)), 1, 1.0, 1)
    assert model.seen == [list(range(12, 20))]


def test_cold_is_greedy(model: WatchedModel) -> None:
    text = list(PROMPT)
    for _ in range(10):
        text.append(int(model.next_token_logits(torch.tensor([text[-8:]]))[0, -1].argmax()))
    assert continuation(model, PROMPT, 10, 1e-6, 1) == text[5:]
    assert continuation(model, PROMPT, 10, 5.0, 1) != text[5:]


def test_draws_from_head_1_at_that_temperature(model: WatchedModel) -> None:
    draws = [continuation(model, PROMPT, 1, 2.0, seed)[0] for seed in range(1500)]
    shares = torch.bincount(torch.tensor(draws), minlength=VOCAB_SIZE) / len(draws)
    with torch.no_grad():
        expected = (model.next_token_logits(torch.tensor([PROMPT]))[0, -1] / 2.0).softmax(-1)
    assert float((shares - expected).abs().sum()) < 0.15


def test_no_tokens(model: WatchedModel) -> None:
    assert continuation(model, PROMPT, 0, 1.0, 1) == []


def test_sees_what_training_showed_of_documents() -> None:
    prompt = [9, 3, 1, 9, 4, 1, 5, 9, 2]
    stream, documents = WatchedModel(loss_across_documents=False), WatchedModel(attention_across_documents=False)
    text = prompt + continuation(stream, prompt, 3, 1.0, 1)
    assert stream.seen == [text[end - 8 : end] for end in range(9, 12)]
    continuation(documents, prompt, 1, 1.0, 1)
    continuation(documents, prompt[:-1], 1, 1.0, 1)
    continuation(documents, prompt[:1], 1, 1.0, 1)
    assert documents.seen == [[2], [4, 1, 5, 9], [9]], "an end-of-document token belongs to the document before it"
