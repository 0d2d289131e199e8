"""The chosen draft length is close to the best fixed one, with noisy times."""

import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import pytest

from mtp_dist.inference.adaptive import AdaptiveLength, MeasuredAcceptance

Cost = Callable[[int], float]
TOKENS, PROMPT_TOKENS, NOISE, INTERRUPTED = 300, 32, 0.3, 0.05


class Case(NamedTuple):
    """A machine and a model, with times in units of a plain forward pass."""

    acceptance: list[float]
    cost: Cost
    rows: int = 1
    catching_up: float = 0.05
    """Time of a position that all heads read later than in the pass after it."""
    reading: float = 0.05
    """Time of a token of the prompts."""
    first_call: float = 0.88
    """Least speed of the first call, which tries drafts, as a fraction of the best."""


CASES = {
    "all drafts pay": Case([0.8, 0.7, 0.7], lambda length: 1 + 0.1 * (length - 1)),
    "some drafts pay": Case([0.85, 0.5, 0.2], lambda length: 1 + 0.25 * (length - 1)),
    "no draft pays": Case([0.3, 0.3, 0.3], lambda length: 1 + 0.6 * (length - 1)),
    "eight heads": Case([0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.5], lambda length: 1 + 0.15 * (length - 1)),
    "a step in the cost": Case([0.8] * 7, lambda length: 1 + 0.05 * (length - 1) + 2 * (length > 4)),
    "a large batch": Case(
        [0.9] * 7, lambda length: 1 + 1.33 * (length - 1), rows=32, catching_up=0.5, reading=1 / 32, first_call=0.96
    ),
}


def tokens_per_second(policy: AdaptiveLength, case: Case, noise: random.Random) -> float:
    """Simulate the decoding of a batch whose forward passes take longer by chance."""
    prompt_tokens = case.rows * PROMPT_TOKENS
    policy.begin(case.rows, prompt_tokens, prompt_tokens * case.reading)
    tokens, seconds, unread = 0, 0.0, PROMPT_TOKENS
    while tokens < TOKENS * case.rows:
        length, accepted = policy.choose(), []
        for _ in range(case.rows):
            accepted.append(0)
            while accepted[-1] < length - 1 and noise.random() < case.acceptance[accepted[-1]]:
                accepted[-1] += 1
        spent, behind = case.cost(length), length > 1 and unread > policy.longest
        spent += case.catching_up * unread * behind
        unread = max(accepted) + 1 if length > 1 else unread + 1
        spent *= (1 + noise.expovariate(1 / NOISE)) * (10 if noise.random() < INTERRUPTED else 1)
        policy.record(length, spent, accepted, not behind)
        tokens, seconds = tokens + sum(accepted) + case.rows, seconds + spent
    return tokens / seconds / case.rows


def expected_rate(length: int, case: Case) -> float:
    tokens, probability = 1.0, 1.0
    for rate in case.acceptance[: length - 1]:
        probability *= rate
        tokens += probability
    return tokens / case.cost(length) / (1 + NOISE) / (1 + 9 * INTERRUPTED)


@pytest.mark.parametrize("name", CASES)
def test_close_to_the_best_fixed_length(name: str) -> None:
    case, rates = CASES[name], []
    for seed in range(30):
        noise = random.Random(seed)
        policy = AdaptiveLength(longest := len(case.acceptance) + 1, MeasuredAcceptance(longest))
        rates.append([tokens_per_second(policy, case, noise) for _ in range(4)])
    best = max(expected_rate(length, case) for length in range(1, longest + 1))
    first, *later = (statistics.mean(call) / best for call in zip(*rates, strict=True))
    assert first > case.first_call and statistics.mean(later) > 0.94, (first, later)


def test_drafts_again_when_they_pay_again() -> None:
    policy, noise = AdaptiveLength(4, MeasuredAcceptance(4)), random.Random(0)
    never, always = (Case([rate] * 3, lambda length: 1 + 0.2 * (length - 1)) for rate in (0.0, 1.0))
    tokens_per_second(policy, never, noise)
    assert not policy.drafting
    for _ in range(16):
        tokens_per_second(policy, always, noise)
    assert policy.drafting and policy.best() == 4


def test_no_longer_drafts_are_tried_if_the_shortest_lose() -> None:
    """Each further head would have to read the prompt first."""
    policy = AdaptiveLength(8, MeasuredAcceptance(8))
    tokens_per_second(policy, Case([0.5] * 7, lambda length: 1 + 0.9 * (length > 1)), random.Random(0))
    assert set(policy.seconds) == {1, 2} and not policy.drafting


def test_a_few_rejected_drafts_do_not_end_drafting() -> None:
    policy = AdaptiveLength(4, MeasuredAcceptance(4))
    for _ in range(12):
        length = policy.choose()
        policy.record(length, 1 + 0.4 * (length - 1), [0], True)
    assert policy.drafting and length > 1
