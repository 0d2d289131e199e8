"""Greedy text is transformers' own, whatever drafts; benchmarks/greedy_identity.py does it for 1,000 prompts."""

import pytest

from benchmarks.greedy_identity import KINDS, compare, faults, random_models, random_prompts


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_leave_the_text_as_it_is(kind: str) -> None:
    model, plain = random_models(kind)
    ways = compare(model, plain, random_prompts(50, model.config.vocab_size), new_tokens=12, batch_size=25)
    assert faults("random", ways) == []
    assert ways["tree"]["tokens_per_forward"] > 1, "some draft is accepted"
