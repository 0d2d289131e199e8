"""The logits of drafts and of their verification equal those of fresh forward passes of the reference.

Equal text cannot reveal a wrong draft: verification hides it.
"""

from collections.abc import Iterator
from itertools import cycle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import GenerationMixin

from mtp_dist.inference import decoding
from mtp_dist.inference.decoding import Decoder
from mtp_dist.inference.drafting import DraftState, draft, draft_after_each, draft_sources
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.tree import DraftTree, choose_tree
from tests.unit.inference.models import TRUNKS, VARIANTS, VOCAB_SIZE, TinyModel, padded_prompts, tiny_model

NEW_TOKENS = 14
TOLERANCE = 1e-5


class Recorder:
    """Decoding in which a script decides which drafts are right, and which compares all logits with the reference."""

    def __init__(
        self, tiny: TinyModel, lengths: list[int], script: list[bool], new_tokens: int = NEW_TOKENS, **options: Any
    ) -> None:
        """options: more arguments of `generate`."""
        self.tiny, self.lengths, self.new_tokens, self.options = tiny, lengths, new_tokens, options
        self.script: Iterator[bool] = cycle(script)
        self.prompts, self.mask = padded_prompts(lengths)
        spare = tiny.config.heads.distances[-1]
        self.texts = self.generate(Speculation(heads=1), new_tokens + spare)
        self.compared = {"drafts": 0, "verified": 0}
        self.known: dict[tuple[tuple[int, ...], int], dict[int, Tensor]] = {}

    def generate(self, speculation: Speculation, new_tokens: int, **options: Any) -> list[list[int]]:
        """Return the texts without their padding."""
        result = self.tiny.model.generate(
            self.prompts,
            attention_mask=self.mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            speculation=speculation,
            **options,
        )
        return [row[max(self.lengths) - length :].tolist() for row, length in zip(result, self.lengths, strict=True)]

    def run(self, speculation: Speculation) -> None:
        """Decode and compare. The first text ends early unless the options have another end, or it repeats a token."""
        original, draft_tree = Decoder._logits, Decoder._draft_tree
        first_text = self.texts[0][self.lengths[0] :]
        latest = max(first_text[:10], key=first_text.index)
        options = {"eos_token_id": latest if first_text.index(latest) > 2 else None} | self.options
        end = options["eos_token_id"]
        nodes = torch.zeros(0)

        def logits(decoder: Decoder, hidden: Tensor) -> Tensor:
            self.decoder, found = decoder, original(decoder, hidden)
            if speculation.tree and found.shape[1] > 1:
                self.compare_tree(decoder, found, nodes, speculation.tree)
            else:
                self.compare_verified(decoder, found)
            return found

        def recorded_nodes(decoder: Decoder, tree: DraftTree) -> Tensor:
            nonlocal nodes
            nodes = draft_tree(decoder, tree)
            return nodes

        with (
            patch.object(decoding, "draft", self.scripted_draft),
            patch.object(decoding, "draft_after_each", self.scripted_drafts),
            patch.object(Decoder, "_logits", logits),
            patch.object(Decoder, "_draft_tree", recorded_nodes),
        ):
            texts = self.generate(speculation, self.new_tokens, **options)
        for text, expected, length in zip(texts, self.texts, self.lengths, strict=True):
            new = expected[length : length + self.new_tokens]
            ended = new[: new.index(end) + 1] if end in new else new
            assert text[: length + len(ended)] == expected[:length] + ended

    def scripted_draft(self, model: MTPForCausalLM, distance: int, state: DraftState, previous: Tensor) -> Tensor:
        """Compare a draft's logits and return some whose largest ones are as the script wants."""
        return self.compare_drafts(draft(model, distance, state, previous), model, distance, state)

    def scripted_drafts(self, model: MTPForCausalLM, distance: int, state: DraftState, previous: Tensor) -> Tensor:
        """Do the same for several tokens before the draft."""
        wanted = []
        for logits, token in zip(draft_after_each(model, distance, state, previous).unbind(1), previous.T, strict=True):
            state.token_ids.scatter_(1, (state.last + distance - 1)[:, None], token[:, None])
            wanted.append(self.compare_drafts(logits, model, distance, state))
        return torch.stack(wanted, 1)

    def compare_drafts(self, logits: Tensor, model: MTPForCausalLM, distance: int, state: DraftState) -> Tensor:
        head, offset = draft_sources(model.config.heads)[distance]
        wanted = torch.zeros_like(logits)
        for row, last in enumerate(state.last.tolist()):
            position = max(0, last - offset)
            read = distance if model.heads.traits.embeds_tokens else 1
            tokens = state.token_ids[row, : last + read].tolist()
            if model.draft_condition:
                ahead = position + model.heads.distances[head - 1] - len(tokens)
                tokens += [0] * (ahead - 1) + [int(state.token_ids[row, last + distance - 1])]
            expected = self.reference(tuple(tokens), last + 1)[head]
            self.compare("drafts", logits[row], expected[0, position])
            right = self.texts[self.decoder.text.rows[row]][last + distance]
            wanted[row, right], wanted[row, (right + 1) % VOCAB_SIZE] = (2.0, 1.0) if next(self.script) else (1.0, 2.0)
        return wanted

    def compare_verified(self, decoder: Decoder, logits: Tensor) -> None:
        text, size = decoder.text, logits.shape[1]
        for row, length in enumerate(text.host_lengths):
            tokens = text.token_ids[row, : length - 1 + size]
            with torch.no_grad():
                expected = self.tiny.reference.next_token_logits(tokens[None])[0, length - 1 :]
            self.compare("verified", logits[row], expected)

    def compare_tree(self, decoder: Decoder, logits: Tensor, nodes: Tensor, tree: DraftTree) -> None:
        text, depths = decoder.text, torch.tensor(tree.depths)
        for row, length in enumerate(text.host_lengths):
            paths = torch.zeros(len(nodes[row]), length + max(tree.depths), dtype=torch.long)
            paths[:, : length - 1] = text.token_ids[row, : length - 1]
            for node, depth in enumerate(tree.depths):
                ancestor = node
                for above in range(depth + 1):
                    paths[node, length - 1 + depth - above] = nodes[row, ancestor]
                    ancestor = tree.parents[ancestor]
            with torch.no_grad():
                expected = self.tiny.reference.next_token_logits(paths)
            self.compare("verified", logits[row], expected[torch.arange(len(depths)), length - 1 + depths])

    def compare(self, kind: str, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        self.compared[kind] += 1

    def reference(self, tokens: tuple[int, ...], length: int) -> dict[int, Tensor]:
        """Return the logits `[1, S, V]` by head for the first `length` tokens, of a forward pass without a cache."""
        if (tokens, length) not in self.known:
            sample = torch.nn.functional.pad(torch.tensor(tokens), (0, self.tiny.config.heads.lookahead))
            with torch.no_grad():
                self.known[tokens, length] = self.tiny.reference(sample[None], length)
        return self.known[tokens, length]


@pytest.fixture(scope="module", params=[*VARIANTS, *TRUNKS])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


class ScriptedLength:
    """A choice of the draft length in the place of the adaptive one."""

    drafting = True

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = cycle(lengths)

    def choose(self) -> int:
        return next(self.lengths)

    def begin(self, rows: int, prompt_tokens: int, prompt_seconds: float) -> None:
        pass

    def record(self, length: int, seconds: float, accepted: list[int], up_to_date: bool) -> None:
        pass


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=3)
SCRIPT = st.lists(st.booleans(), min_size=1, max_size=12)


@given(LENGTHS, SCRIPT, st.sampled_from([2, 3, 4, 4]), st.sampled_from([{}, {"cache_implementation": "static"}]))
@example([3, 1, 6], [True, True, False, True, True], 4, {})
@settings(max_examples=2)
def test_chains(tiny: TinyModel, lengths: list[int], script: list[bool], heads: int, options: dict[str, str]) -> None:
    recorder = Recorder(tiny, lengths, script, **options)
    recorder.run(Speculation(heads=heads))
    assert recorder.compared["drafts"] and recorder.compared["verified"]


@given(LENGTHS, SCRIPT, st.lists(st.integers(1, 7), min_size=1, max_size=8))
@settings(max_examples=1)
@example([3, 1], [True, True, False], [7, 1, 1, 2, 3, 1, 7])
def test_changing_lengths(tiny: TinyModel, lengths: list[int], script: list[bool], drafts: list[int]) -> None:
    """Heads that were left out for some passes read the positions in between when they are used again."""
    longest = tiny.config.heads.distances[-1]
    policy = ScriptedLength([min(length, longest) for length in drafts])
    recorder = Recorder(tiny, lengths, script)
    with patch.object(MTPForCausalLM, "adaptive_length", lambda model, rows: policy):
        recorder.run(Speculation())
    assert recorder.compared["verified"]


@given(LENGTHS, SCRIPT)
@settings(max_examples=1)
@example([3, 1], [False, True, True])
def test_trees(tiny: TinyModel, lengths: list[int], script: list[bool]) -> None:
    recorder = Recorder(tiny, lengths, script)
    depth = tiny.config.heads.distances[-1] - 1
    recorder.run(Speculation(tree=choose_tree([[0.5, 0.3, 0.2]] * depth, 9)))
    assert recorder.compared["drafts"] and recorder.compared["verified"]


def test_candidates_follow_their_parents() -> None:
    """Several nodes of one depth have the same rank, and other tokens if the tokens of their parents differ."""
    tiny, tree = tiny_model("conditioned"), choose_tree([[0.5, 0.4, 0.3]] * 3, 16)
    recorder, draft_tree = Recorder(tiny, [3, 5], [True]), Decoder._draft_tree
    recorded: list[tuple[list[int], list[int]]] = []

    def record(decoder: Decoder, tree: DraftTree) -> Tensor:
        nodes, text = draft_tree(decoder, tree), decoder.text
        for row, length in enumerate(text.host_lengths):
            recorded.append((text.token_ids[row, :length].tolist(), nodes[row].tolist()))
        return nodes

    with patch.object(Decoder, "_draft_tree", record):
        recorder.generate(Speculation(tree=tree), 6)
    others = 0
    for text, nodes in recorded:
        for node, (parent, rank, depth) in enumerate(zip(tree.parents, tree.ranks, tree.depths, strict=True)):
            if not node:
                continue
            read = (*text[:-1], *[0] * (depth - 1), nodes[parent])
            candidates = recorder.reference(read, len(text) - 1)[depth + 1][0, -1].topk(rank + 1).indices
            assert nodes[node] == candidates[rank]
            twin = next(n for n, key in enumerate(zip(tree.depths, tree.ranks, strict=True)) if key == (depth, rank))
            others += nodes[node] != nodes[twin]
    assert others, "the condition changes some candidates"


@pytest.mark.parametrize("variant", ["parallel", "sequential"])
def test_a_finished_text_beside_another(variant: str) -> None:
    """One text has a single token left when all its drafts are right, and is finished long before the other."""
    tiny = tiny_model(variant, heads=8)
    Recorder(tiny, [3, 3], [True, False], new_tokens=2 * 8 + 2, eos_token_id=None).run(Speculation(heads=8))


def test_bf16_text_differs_only_where_logits_are_close() -> None:
    tiny = tiny_model("parallel")
    prompts, mask = padded_prompts([3, 1, 6])
    model = tiny.model.to(torch.bfloat16)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW_TOKENS}
    expected = GenerationMixin.generate(model, prompts, **options)
    for speculation in (Speculation(heads=4), Speculation(tree=choose_tree([[0.5, 0.3]] * 3, 6))):
        found = model.generate(prompts, speculation=speculation, **options)
        assert found.shape == expected.shape
        for row in (found != expected).any(1).nonzero().flatten().tolist():
            column = int((found[row] != expected[row]).nonzero()[0])
            text = expected[row, :column][prompts.shape[1] - int(mask[row].sum()) :]
            first, second = tiny.reference.next_token_logits(text[None])[0, -1].topk(2).values.tolist()
            assert first - second < 0.05 * abs(first)
