"""Options of transformers' `generate` have the result that they have there, also inside a run of accepted drafts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from string import ascii_letters
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast, StoppingCriteria, TextStreamer
from transformers.generation import GenerationMixin

from mtp_dist.inference import decoding
from mtp_dist.inference.decoding import Decoder
from mtp_dist.inference.drafting import DraftState
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.tree import choose_tree
from tests.unit.inference.models import END, VOCAB_SIZE, padded_prompts, tiny_model

LENGTHS = [3, 1, 6]
NEW_TOKENS = 16
WAYS = {
    "chain": lambda: Speculation(heads=4),
    "adaptive": Speculation,
    "tree": lambda: Speculation(tree=choose_tree([[0.5, 0.3, 0.2]] * 3, 9)),
}
LETTERS = ascii_letters[:VOCAB_SIZE]


@pytest.fixture(scope="module")
def model() -> MTPForCausalLM:
    return tiny_model("parallel", init_std=0.4).model


@pytest.fixture(scope="module")
def text(model: MTPForCausalLM) -> list[list[int]]:
    """Return the tokens after each prompt without any option."""
    return plain(model, LENGTHS)[:, max(LENGTHS) :].tolist()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, merges=[]))
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=LETTERS[END])


def inputs(lengths: list[int], options: dict[str, Any]) -> dict[str, Any]:
    prompts, mask = padded_prompts(lengths)
    return {"inputs": prompts, "attention_mask": mask, "do_sample": False, "max_new_tokens": NEW_TOKENS, **options}


def plain(model: MTPForCausalLM, lengths: list[int], **options: Any) -> Tensor:
    """Generate by transformers' own decoding."""
    return GenerationMixin.generate(model, **inputs(lengths, options))


@contextmanager
def scripted_drafts(
    texts: Tensor, mask: Tensor, script: Sequence[bool] = (True, True, False, True, True)
) -> Iterator[None]:
    """Let the drafts be those of the texts, or the best ones but one if the script is False."""
    padding, right_first, step = (mask == 0).sum(1).tolist(), cycle(script), Decoder.step
    decoders: list[Decoder] = []

    def draft(model: MTPForCausalLM, distance: int, state: DraftState, previous: Tensor) -> Tensor:
        logits = torch.zeros(len(state.last), VOCAB_SIZE)
        for index, (row, last) in enumerate(zip(decoders[-1].text.rows, state.last.tolist(), strict=True)):
            column = padding[row] + last + distance
            right = int(texts[row, column]) if column < texts.shape[1] else 0
            logits[index, right], logits[index, (right + 1) % VOCAB_SIZE] = (
                (2.0, 1.0) if next(right_first) else (1.0, 2.0)
            )
        return logits

    def recorded_step(decoder: Decoder) -> list[list[int]]:
        decoders.append(decoder)
        return step(decoder)

    with patch.object(decoding, "draft", draft), patch.object(Decoder, "step", recorded_step):
        yield


def check(model: MTPForCausalLM, way: str, lengths: list[int] = LENGTHS, **options: Any) -> list[list[int]]:
    """Compare with transformers, and return the new tokens."""
    expected, speculation = plain(model, lengths, **options), WAYS[way]()
    with scripted_drafts(expected, padded_prompts(lengths)[1]):
        found = model.generate(**inputs(lengths, options), speculation=speculation)
    assert found.tolist() == expected.tolist()
    if expected.shape[1] > max(lengths) + 6 and way != "adaptive":
        assert speculation.statistics.tokens_per_forward > 1.5, "runs of drafts are accepted"
    new: list[list[int]] = expected[:, max(lengths) :].tolist()
    return new


class TwiceTheSame(StoppingCriteria):
    """Ends a text that contains its last token once before, padding included."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids == input_ids[:, -1:]).sum(1) == 2


@pytest.mark.parametrize("way", WAYS)
def test_ends(model: MTPForCausalLM, text: list[list[int]], way: str) -> None:
    ends = [text[0][5], text[1][8]]
    ended = check(model, way, eos_token_id=ends)
    assert ended != text and END in ended[0], "a text ends and is padded"
    check(model, way, eos_token_id=ends, min_new_tokens=7)
    check(model, way, eos_token_id=ends, exponential_decay_length_penalty=(3, 1.4))
    check(model, way, eos_token_id=ends, forced_eos_token_id=ends[0])
    for new_tokens in (1, 2, 6):
        check(model, way, max_new_tokens=new_tokens)
    check(model, way, max_new_tokens=None, max_length=max(LENGTHS) + 7)
    assert len(check(model, way, max_time=1e-9)[0]) == 1


@pytest.mark.parametrize("way", WAYS)
def test_criteria(model: MTPForCausalLM, text: list[list[int]], tokenizer: PreTrainedTokenizerFast, way: str) -> None:
    stop = ["".join(LETTERS[token] for token in text[row][place : place + 2]) for row, place in ((0, 4), (2, 8))]
    # Without an end token transformers goes on with a text that has stopped until all have.
    assert check(model, way, stop_strings=stop, tokenizer=tokenizer, eos_token_id=END) != text
    assert check(model, way, stopping_criteria=[TwiceTheSame()], eos_token_id=END) != text


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 1},
    "suppressed": {"begin_suppress_tokens": list(range(0, 40, 2)), "suppress_tokens": [1, 5]},
    "both": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_that_read_the_text(model: MTPForCausalLM, text: list[list[int]], name: str, way: str) -> None:
    assert check(model, way, **PROCESSORS[name]) != text


@pytest.mark.parametrize("way", WAYS)
def test_bad_words_and_bias(model: MTPForCausalLM, text: list[list[int]], way: str) -> None:
    assert check(model, way, bad_words_ids=[[text[0][3]], text[1][4:6]]) != text
    assert check(model, way, sequence_bias=[[[text[0][2]], -9.0], [text[2][6:8], -9.0]]) != text


@pytest.mark.parametrize("way", WAYS)
def test_caches_and_single_tokens(model: MTPForCausalLM, text: list[list[int]], way: str) -> None:
    assert check(model, way, cache_implementation="static") == text
    check(model, way, lengths=[1])
    check(model, way, lengths=[1, 1], eos_token_id=text[1][8])


def test_streamers_get_the_text(
    model: MTPForCausalLM, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    for skip_prompt in (False, True):
        plain(model, [4], streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt))
        expected = capsys.readouterr().out
        model.generate(**inputs([4], {"streamer": TextStreamer(tokenizer, skip_prompt=skip_prompt)}))
        assert capsys.readouterr().out == expected and len(expected.strip()) == NEW_TOKENS + 4 * (not skip_prompt)


def test_transformers_serves_the_rest(model: MTPForCausalLM, text: list[list[int]]) -> None:
    cases: list[dict[str, Any]] = [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefix_allowed_tokens_fn": lambda row, _: list(range(10 * row, 10 * row + 9))},
        {"guidance_scale": 1.7},
    ]
    for options in cases:
        found = model.generate(**inputs(LENGTHS, options))
        assert found.tolist() == plain(model, LENGTHS, **options).tolist()
    cache = DynamicCache()
    assert model.generate(**inputs(LENGTHS, {"cache": cache}))[:, max(LENGTHS) :].tolist() == text
    assert cache.get_seq_length()
    result = model.generate(**inputs(LENGTHS, {"return_dict_in_generate": True, "output_scores": True}))
    assert result.sequences[:, max(LENGTHS) :].tolist() == text and len(result.scores) == NEW_TOKENS


def test_several_texts_per_prompt(model: MTPForCausalLM) -> None:
    torch.manual_seed(0)
    found = model.generate(**inputs(LENGTHS, {"do_sample": True, "num_return_sequences": 4}))
    assert found.shape == (12, max(LENGTHS) + NEW_TOKENS)
    assert len({tuple(row) for row in found.tolist()}) > 6
    assert found[:, : max(LENGTHS)].tolist() == padded_prompts(LENGTHS)[0].repeat_interleave(4, 0).tolist()
