"""The logits of drafts and of their verification equal those of fresh forward passes of the reference.

Equal text cannot reveal a wrong draft: verification hides it.
"""

from collections.abc import Iterator
from itertools import cycle
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_dist.inference import decoding
from mtp_dist.inference.decoding import Decoder
from mtp_dist.inference.drafting import DraftState, draft, draft_sources
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.tree import choose_tree
from tests.unit.inference.models import VARIANTS, VOCAB_SIZE, TinyModel, padded_prompts, tiny_model

NEW_TOKENS = 20
TOLERANCE = 1e-5


class Recorder:
    """Decoding in which a script decides which drafts are right, and which compares all logits with the reference."""

    def __init__(self, tiny: TinyModel, lengths: list[int], script: list[bool]) -> None:
        self.tiny, self.lengths = tiny, lengths
        self.script: Iterator[bool] = cycle(script)
        self.prompts, self.mask = padded_prompts(lengths)
        spare = tiny.config.heads.distances[-1]
        self.texts = self.generate(Speculation(heads=1), NEW_TOKENS + spare)
        self.compared = {"drafts": 0, "verified": 0}

    def generate(self, speculation: Speculation, new_tokens: int) -> list[list[int]]:
        """Return the texts without their padding."""
        result = self.tiny.model.generate(
            self.prompts,
            attention_mask=self.mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            speculation=speculation,
        )
        return [row[-new_tokens - length :].tolist() for row, length in zip(result, self.lengths, strict=True)]

    def run(self, speculation: Speculation) -> None:
        """Decode and compare."""
        original = Decoder._logits

        def logits(decoder: Decoder, hidden: Tensor) -> Tensor:
            self.decoder, found = decoder, original(decoder, hidden)
            if not speculation.tree:
                self.compare_verified(decoder, found)
            return found

        with patch.object(decoding, "draft", self.scripted_draft), patch.object(Decoder, "_logits", logits):
            texts = self.generate(speculation, NEW_TOKENS)
        assert texts == [text[: len(new)] for text, new in zip(self.texts, texts, strict=True)]

    def scripted_draft(self, model: MTPForCausalLM, distance: int, state: DraftState, previous: Tensor) -> Tensor:
        """Compare a draft's logits and return some whose largest ones are as the script wants."""
        logits = draft(model, distance, state, previous)
        head, offset = draft_sources(model.config.heads)[distance]
        wanted = torch.zeros_like(logits)
        for row, last in enumerate(state.last.tolist()):
            if self.decoder.text.finished[row]:  # its drafts are not used
                continue
            position = max(0, last - offset)
            expected = self.reference(state.token_ids[row, : last + distance], last + 1, head)[position]
            self.compare("drafts", logits[row], expected)
            right = self.texts[row][last + distance]
            wanted[row, right if next(self.script) else (right + 1) % VOCAB_SIZE] = 1.0
        return wanted

    def compare_verified(self, decoder: Decoder, logits: Tensor) -> None:
        text, size = decoder.text, logits.shape[1]
        for row, length in enumerate(text.host_lengths):
            if text.finished[row]:
                continue
            tokens = text.token_ids[row, : length - 1 + size]
            self.compare("verified", logits[row], self.reference(tokens, len(tokens), 1)[length - 1 :])

    def compare(self, kind: str, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        self.compared[kind] += 1

    def reference(self, tokens: Tensor, length: int, head: int) -> Tensor:
        """Return a head's logits `[S, V]` for the first `length` tokens, of a forward pass without a cache."""
        sample = torch.nn.functional.pad(tokens, (0, self.tiny.config.heads.lookahead))
        with torch.no_grad():
            return self.tiny.reference(sample[None], length)[head][0]


@pytest.fixture(scope="module", params=VARIANTS)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    script=st.lists(st.booleans(), min_size=1, max_size=12),
    heads=st.sampled_from([2, 4, 4]),
)
@settings(max_examples=4, deadline=None)
def test_chains(tiny: TinyModel, lengths: list[int], script: list[bool], heads: int) -> None:
    recorder = Recorder(tiny, lengths, script)
    recorder.run(Speculation(heads=heads))
    assert recorder.compared["drafts"] and recorder.compared["verified"]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    script=st.lists(st.booleans(), min_size=1, max_size=12),
)
@settings(max_examples=2, deadline=None)
def test_trees(tiny: TinyModel, lengths: list[int], script: list[bool]) -> None:
    recorder = Recorder(tiny, lengths, script)
    depth = tiny.config.heads.distances[-1] - 1
    recorder.run(Speculation(tree=choose_tree([[0.5, 0.3, 0.2]] * depth, 9)))
    assert recorder.compared["drafts"]


def test_text_that_ends_inside_a_draft() -> None:
    """Its heads stop at its end, which is the end of the cache too, while another text goes on."""
    Recorder(tiny_model("parallel"), [44, 44], [True, False]).run(Speculation(heads=3))
