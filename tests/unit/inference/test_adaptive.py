"""The chosen draft length is close to the best fixed one, with noisy times."""

import random
import statistics
from collections.abc import Callable

import pytest

from mtp_dist.inference.adaptive import AdaptiveLength

Cost = Callable[[int], float]
TOKENS, NOISE, INTERRUPTED = 400, 0.3, 0.05
CASES: dict[str, tuple[list[float], Cost]] = {
    "all drafts pay": ([0.8, 0.7, 0.7], lambda length: 1 + 0.1 * (length - 1)),
    "some drafts pay": ([0.85, 0.5, 0.2], lambda length: 1 + 0.25 * (length - 1)),
    "no draft pays": ([0.3, 0.3, 0.3], lambda length: 1 + 0.6 * (length - 1)),
    "eight heads": ([0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.5], lambda length: 1 + 0.15 * (length - 1)),
    "a step in the cost": ([0.8] * 7, lambda length: 1 + 0.05 * (length - 1) + 2 * (length > 4)),
}


def tokens_per_second(policy: AdaptiveLength, acceptance: list[float], cost: Cost, noise: random.Random) -> float:
    """Simulate the decoding of one text whose forward passes take longer by chance."""
    tokens, seconds = 0, 0.0
    while tokens < TOKENS:
        length, accepted = policy.choose(), 0
        while accepted < length - 1 and noise.random() < acceptance[accepted]:
            accepted += 1
        spent = cost(length) * (1 + noise.expovariate(1 / NOISE)) * (10 if noise.random() < INTERRUPTED else 1)
        policy.record(length, spent, [accepted])
        tokens, seconds = tokens + 1 + accepted, seconds + spent
    return tokens / seconds


def expected_rate(length: int, acceptance: list[float], cost: Cost) -> float:
    tokens, probability = 1.0, 1.0
    for rate in acceptance[: length - 1]:
        probability *= rate
        tokens += probability
    return tokens / cost(length) / (1 + NOISE) / (1 + 9 * INTERRUPTED)


@pytest.mark.parametrize("case", CASES)
def test_close_to_the_best_fixed_length(case: str) -> None:
    acceptance, cost = CASES[case]
    rates = []
    for seed in range(30):
        noise = random.Random(seed)
        policy = AdaptiveLength(len(acceptance) + 1)
        first = tokens_per_second(policy, acceptance, cost, noise)
        rates.append((first, tokens_per_second(policy, acceptance, cost, noise)))
    best = max(expected_rate(length, acceptance, cost) for length in range(1, len(acceptance) + 2))
    first, second = (statistics.mean(column) / best for column in zip(*rates, strict=True))
    assert first > 0.9 and second > 0.94, (first, second)


def test_drafts_again_when_they_pay_again() -> None:
    policy, noise = AdaptiveLength(4), random.Random(0)
    never, always = [0.0] * 3, [1.0] * 3
    tokens_per_second(policy, never, lambda length: 1 + 0.2 * (length - 1), noise)
    assert policy.best() == 1
    for _ in range(12):
        tokens_per_second(policy, always, lambda length: 1 + 0.2 * (length - 1), noise)
    assert policy.best() == 4
