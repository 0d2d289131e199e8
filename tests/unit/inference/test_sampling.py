"""Samples of text from head 1."""

import pytest
import torch
from torch import Tensor

from mtp_dist.inference.sampling import sample_continuation
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import tiny_config

VOCAB_SIZE, END_OF_DOCUMENT = 20, 9
PROMPT = [3, 1, 4, 1, 5]


class RecordingModel(ReferenceModel):
    """Records the tokens of every call."""

    def __init__(self, **data: bool) -> None:
        sections = {"train": {"sequence_length": 8}, "model": {"init_std": 0.3, "vocab_size": VOCAB_SIZE}, "data": data}
        super().__init__(tiny_config(**sections))
        self.contexts: list[list[int]] = []

    def next_token_logits(self, tokens: Tensor) -> Tensor:
        self.contexts.append(tokens[0].tolist())
        return super().next_token_logits(tokens)

    def sample(self, prompt: list[int], tokens: int, temperature: float = 1.0, seed: int = 1) -> list[int]:
        self.contexts.clear()
        return sample_continuation(self, prompt, tokens, temperature, seed, END_OF_DOCUMENT)


@pytest.fixture(scope="module")
def model() -> RecordingModel:
    return RecordingModel()


def test_repeats_by_seed(model: RecordingModel) -> None:
    first, second, other = (model.sample(PROMPT, 12, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    assert len(first) == 12 and all(0 <= token < VOCAB_SIZE for token in first)
    torch.manual_seed(7)
    assert model.sample(PROMPT, 12) == first, "the global generator does not matter"
    assert model.sample(PROMPT, 5) == first[:5] and model.sample(PROMPT, 0) == []


def test_context_is_the_last_tokens(model: RecordingModel) -> None:
    prompt = list(PROMPT)
    text = prompt + model.sample(prompt, 10)
    assert prompt == PROMPT, "the caller's list is untouched"
    assert model.contexts == [text[max(0, end - 8) : end] for end in range(5, 15)]
    model.sample(list(range(20)), 1)
    assert model.contexts == [list(range(12, 20))]


def test_cold_is_greedy(model: RecordingModel) -> None:
    text = list(PROMPT)
    for _ in range(10):
        text.append(int(model.next_token_logits(torch.tensor([text[-8:]]))[0, -1].argmax()))
    assert model.sample(PROMPT, 10, 1e-6) == text[5:] != model.sample(PROMPT, 10, 5.0)


def test_draws_from_head_1_at_that_temperature(model: RecordingModel) -> None:
    draws = [model.sample(PROMPT, 1, 2.0, seed)[0] for seed in range(1500)]
    shares = torch.bincount(torch.tensor(draws), minlength=VOCAB_SIZE) / len(draws)
    with torch.no_grad():
        expected = (model.next_token_logits(torch.tensor([PROMPT]))[0, -1] / 2.0).softmax(-1)
    assert float((shares - expected).abs().sum()) < 0.15


def test_context_has_the_documents_of_training() -> None:
    prompt = [9, 3, 1, 9, 4, 1, 5, 9, 2]
    stream, documents = RecordingModel(loss_across_documents=False), RecordingModel(attention_across_documents=False)
    text = prompt + stream.sample(prompt, 3)
    assert stream.contexts == [text[end - 8 : end] for end in range(9, 12)]
    # An end-of-document token belongs to the document before it.
    for given, context in [(prompt, [2]), (prompt[:-1], [4, 1, 5, 9]), (prompt[:1], [9])]:
        documents.sample(given, 1)
        assert documents.contexts == [context]
