"""Sampled texts are distributed exactly as head 1's own samples, and the test finds wrong rules of acceptance."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from mtp_dist.inference import sampling
from mtp_dist.inference.sampling import Drafts, draw, speculative_sample
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.tree import choose_tree
from tests.unit.inference.models import TinyModel, padded_prompts, tiny_model

VOCAB_SIZE, NEW_TOKENS = 5, 4
SAMPLES = 1500
"""Texts for each prompt."""
SAMPLES_ONE_BY_ONE = 200
ACCEPTED, FOUND = 1e-3, 1e-6
"""Probabilities of a larger chi-square: the right rule's is above the first, a wrong rule's below the second."""
CHAIN, TREE = Speculation(heads=4), Speculation(tree=choose_tree([[0.5, 0.3, 0.2]] * 3, 9))
WARPED = {"temperature": 0.8, "top_k": 4, "top_p": 0.9, "min_p": 0.06}


@pytest.fixture(scope="module", params=["parallel", "sequential"])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param, init_std=0.3, vocab_size=VOCAB_SIZE)


def head_1_distribution(tiny: TinyModel, prompt: Tensor, options: dict[str, float]) -> dict[tuple[int, ...], float]:
    """Return the probability of each continuation, from the reference and without any of the code under test."""
    makers: dict[str, Callable[[Any], Any]] = {
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    warpers = LogitsProcessorList([makers[name](value) for name, value in options.items()])
    probabilities = {(): 1.0}
    for length in range(NEW_TOKENS):
        texts = [torch.tensor([*prompt.tolist(), *new]) for new in product(range(VOCAB_SIZE), repeat=length)]
        with torch.no_grad():
            logits = tiny.reference.next_token_logits(torch.stack(texts))[:, -1]
        after = warpers(None, logits).softmax(-1).double().tolist()  # type: ignore[arg-type]
        probabilities = {
            (*new, token): probability * weight
            for (new, probability), weights in zip(probabilities.items(), after, strict=True)
            for token, weight in enumerate(weights)
        }
    return probabilities


def chi_square(expected: dict[tuple[int, ...], float], texts: list[tuple[int, ...]]) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom; continuations expected fewer than 5 times are one class."""
    counts, statistic, classes, rest = Counter(texts), 0.0, 0, [0.0, 0]
    assert all(expected[text] > 0 for text in counts), "head 1 never writes this"
    for text, probability in expected.items():
        mean = probability * len(texts)
        if mean >= 5:
            statistic, classes = statistic + (counts[text] - mean) ** 2 / mean, classes + 1
        else:
            rest = [rest[0] + mean, rest[1] + counts[text]]
    if rest[0] >= 5:
        statistic, classes = statistic + (rest[1] - rest[0]) ** 2 / rest[0], classes + 1
    return statistic, classes - 1


def p_value(
    tiny: TinyModel, lengths: list[int], speculation: Speculation, options: dict[str, float], one_by_one: bool = False
) -> float:
    """Sample after prompts of these lengths and return the probability of a larger chi-square."""
    prompts, mask = padded_prompts(lengths, vocab_size=VOCAB_SIZE)
    torch.manual_seed(0)
    rows, calls = (1, SAMPLES_ONE_BY_ONE) if one_by_one else (SAMPLES, 1)
    results = [
        tiny.model.generate(
            prompts.repeat(rows, 1),
            attention_mask=mask.repeat(rows, 1),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            speculation=speculation,
            **{"top_k": 0, **options},
        )
        for _ in range(calls)
    ]
    new = [tuple(row) for row in torch.cat(results)[:, -NEW_TOKENS:].tolist()]
    statistic, degrees = 0.0, 0
    for number, length in enumerate(lengths):
        expected = head_1_distribution(tiny, prompts[number, -length:], options)
        found = chi_square(expected, new[number :: len(lengths)])
        statistic, degrees = statistic + found[0], degrees + found[1]
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()))


@pytest.mark.parametrize("speculation", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("options", [{}, WARPED], ids=["plain", "warped"])
def test_distribution_is_head_1s(tiny: TinyModel, speculation: Speculation, options: dict[str, float]) -> None:
    speculation = Speculation(speculation.heads, speculation.tree)
    assert p_value(tiny, [3, 1, 6], speculation, options) > ACCEPTED
    assert 0.2 < speculation.statistics.acceptance[2] < 0.9, "drafts are accepted and rejected"


@pytest.mark.parametrize("speculation", [CHAIN, TREE], ids=["chain", "tree"])
def test_distribution_of_single_texts(speculation: Speculation) -> None:
    tiny = tiny_model("causal", init_std=0.3, vocab_size=VOCAB_SIZE)
    assert p_value(tiny, [3], speculation, {"temperature": 0.6}, one_by_one=True) > ACCEPTED


def accept_always(p: Tensor, q: Tensor) -> Tensor:
    return torch.ones_like(p, dtype=torch.bool)


def accept_by_target_only(p: Tensor, q: Tensor) -> Tensor:
    return torch.rand_like(p) < p


def accept_rightly(p: Tensor, q: Tensor) -> Tensor:
    return torch.rand_like(p) * q < p


def positive_difference(p: Tensor, q: Tensor) -> Tensor:
    return torch.where((p > q).any(-1, keepdim=True), (p - q).clamp(min=0), p)


RULES = {
    "right": (accept_rightly, positive_difference),
    "accept always": (accept_always, positive_difference),
    "accept by the target's probability only": (accept_by_target_only, positive_difference),
    "redraw from the target": (accept_rightly, lambda p, q: p),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lengths", [[3], [3, 1, 6]], ids=["one prompt", "mixed"])
def test_wrong_rules_are_found(name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    accept, residual = RULES[name]

    def sample(target: Tensor, drafts: Drafts) -> tuple[Tensor, Tensor]:
        tokens, q = drafts
        if q is None:
            return speculative_sample(target, drafts)
        p = target[:, :-1]
        matches = accept(*(weights.gather(-1, tokens[..., None]).squeeze(-1) for weights in (p, q)))
        accepted = matches.long().cumprod(1).sum(1)
        after = torch.cat([residual(p, q), target[:, -1:]], 1)[torch.arange(len(target)), accepted]
        return torch.cat([tokens, tokens[:, :1]], 1).scatter(1, accepted[:, None], draw(after)[:, None]), accepted

    monkeypatch.setattr(sampling, "speculative_sample", sample)
    found = p_value(tiny_model("parallel", init_std=0.3, vocab_size=VOCAB_SIZE), lengths, CHAIN, {})
    assert found > ACCEPTED if name == "right" else found < FOUND


@pytest.mark.parametrize("speculation", [CHAIN, TREE], ids=["chain", "tree"])
def test_same_seed_gives_the_same_text(speculation: Speculation) -> None:
    tiny, (prompts, mask) = tiny_model("repeated", init_std=0.3), padded_prompts([2, 5])
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"attention_mask": mask, "do_sample": True, "max_new_tokens": 12, "speculation": speculation}
        texts.append(tiny.model.generate(prompts, **options).tolist())
    assert texts[0] == texts[1] != texts[2]
