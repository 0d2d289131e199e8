"""Soft targets of the chunked linear cross-entropy equal PyTorch's probability targets in fp64, gradients included."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_dist.bench.measure import peak_bytes
from mtp_dist.loss.linear_cross_entropy import GradientBuffers, SoftTargets, Vocabulary, linear_cross_entropy
from mtp_dist.model.targets import IGNORE_INDEX
from tests.ranks import Ranks
from tests.unit.loss.linear_comparison import (
    ALONE,
    BOUNDS,
    SIZES,
    TOKENS,
    VOCAB_SIZE,
    WIDTH,
    answers_of,
    assert_equals_fp64,
    assert_one_collective_a_chunk,
    in_dtype,
    steep_logits,
)
from tests.unit.loss.linear_on_ranks import LinearAnswer, LinearCase, truth_of

ENTRIES = 5
SOFT_BOUNDS = BOUNDS | {torch.float64: (1e-11, 1e-11)}
STEEP_BOUND = 1e-3
"""Of the gradient of hidden where weights of 10^4 multiply the rounding of the softmax."""


def random_case() -> LinearCase:
    """Without ordinary targets."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator) * 0.7
    entries = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:ENTRIES] for _ in range(TOKENS)])
    probabilities = torch.randn(TOKENS, ENTRIES, generator=generator).softmax(1)
    none = torch.full((TOKENS,), IGNORE_INDEX)
    return LinearCase(hidden, weight, none, soft=(entries, probabilities), soft_weight=1.0)


def steep_case() -> LinearCase:
    """Logits of 10^4, -10^4 and 0, exact in fp32, that the soft targets put first, last or among equal ones."""
    hidden, weight = steep_logits()
    entries = torch.tensor([[7, 70]] * 6)
    probabilities = torch.tensor([[0.75, 0.25]] * 6)
    return LinearCase(hidden, weight, torch.full((6,), IGNORE_INDEX), soft=(entries, probabilities), soft_weight=0.5)


def with_mass(case: LinearCase, mass: Tensor) -> LinearCase:
    assert case.soft
    return replace(case, soft=(case.soft[0], case.soft[1] * mass.unsqueeze(1)))


def with_entries(case: LinearCase, entries: Tensor) -> LinearCase:
    assert case.soft
    return replace(case, soft=(entries, case.soft[1]))


def into_padding(case: LinearCase) -> LinearCase:
    """The last two entries have probability 0 and point where nothing is: all padding on a rank, or beyond all."""
    assert case.soft
    entries, probabilities = (tensor.clone() for tensor in case.soft)
    entries[:, -2], entries[:, -1] = 191, 200
    probabilities[:, -2:] = 0.0
    return replace(case, soft=(entries, probabilities))


def real_cases() -> dict[str, LinearCase]:
    generator = torch.Generator().manual_seed(8)
    case, steep = random_case(), steep_case()
    entries = case.soft[0] if case.soft else torch.empty(0)
    targets = torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=generator)
    uneven = targets.masked_fill(torch.rand(TOKENS, generator=generator) < 0.4, IGNORE_INDEX)
    both = replace(case, targets=targets, soft_weight=0.25)
    some = (torch.rand(TOKENS, generator=generator) < 0.6).float()
    assert steep.soft
    mixed = replace(with_mass(both, some), targets=uneven, z_loss=1e-2)
    close = torch.tensor([0, 0, 0, 0, 1.0, 0])
    cases = {
        "soft alone": case,
        "beside targets": both,
        "beside targets, z-loss": replace(both, z_loss=1e-2),
        "some rows of either": mixed,
        "no rows": with_mass(replace(case, z_loss=1e-2), some * 0),
        "one row": with_mass(case, torch.eye(TOKENS)[11]),
        "any mass": with_mass(both, torch.rand(TOKENS, generator=generator) * 3),
        "weight 0": replace(both, soft_weight=0.0),
        "entries twice": with_entries(mixed, entries[:, [0, 1, 0, 1, 1]]),
        "the target among them": with_entries(both, torch.cat([targets[:, None], entries[:, 1:]], 1)),
        "one rank has all": with_entries(both, entries % 60),
        "the last 3 entries": with_entries(both, 128 + entries % 3),
        "into padding": into_padding(mixed),
        "steep": steep,
        "steep, small losses": with_mass(steep, close),
        "steep, beside targets": replace(steep, targets=torch.tensor([7, 7, 70, 130, 70, 0]), z_loss=1e-2),
        "one token a chunk": replace(mixed, chunk_tokens=1),
        "chunks of 3": replace(mixed, chunk_tokens=3),
        "chunk larger than all": replace(mixed, chunk_tokens=1000),
        "frozen": replace(mixed, frozen=True),
        "added": replace(mixed, start=0.125, chunk_tokens=3, scale=7.0),
    }
    low = ("soft alone", "some rows of either", "chunks of 3", "entries twice")
    cases |= {f"{name} in bf16": in_dtype(cases[name], torch.bfloat16) for name in low}
    return cases | {f"{name} in fp64": in_dtype(cases[name], torch.float64) for name in (*low, "steep")}


@functools.cache
def _answers(ranks: Ranks, size: int) -> dict[str, list[LinearAnswer]]:
    return answers_of(ranks, size, real_cases())


@pytest.mark.parametrize("name", real_cases())
@pytest.mark.parametrize("size", SIZES)
def test_equals_autograd_in_fp64(ranks: Ranks, size: int, name: str) -> None:
    case = real_cases()[name]
    hidden_bound = STEEP_BOUND if name == "steep, small losses" else None
    assert_equals_fp64(case, _answers(ranks, size)[name], SOFT_BOUNDS[case.hidden.dtype], hidden_bound)


def test_cases_say_something() -> None:
    truths = {name: truth_of(case) for name, case in real_cases().items()}
    assert 0.5 < truths["steep, small losses"][0][3] < 0.6, "out of logits of 10^4"
    assert truths["steep"][0][3] > 2e4 and truths["soft alone"][0][3] > 50
    assert (~truths["some rows of either"][1].any(1)).any(), "rows with neither"
    assert truths["no rows"][0][3] == 0 and not truths["no rows"][1].any()


@pytest.mark.parametrize("size", SIZES)
def test_no_row_gives_exactly_0(ranks: Ranks, size: int) -> None:
    for answer in _answers(ranks, size)["no rows"]:
        assert answer.weight is not None
        assert not answer.sums.any() and not answer.hidden.any() and not answer.weight.any()


@pytest.mark.parametrize("size", SIZES)
def test_one_collective_a_chunk(ranks: Ranks, size: int) -> None:
    assert_one_collective_a_chunk(
        _answers(ranks, size), {"soft alone": 1, "chunks of 3": 9, "one token a chunk": TOKENS}, size
    )


@hypothesis_settings(max_examples=60)
@given(
    tokens=st.integers(1, 9),
    entries=st.integers(1, 12),
    soft_entries=st.integers(1, 15),
    padding=st.integers(0, 3),
    chunk_tokens=st.one_of(st.none(), st.integers(1, 11)),
    z_loss=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    tokens: int, entries: int, soft_entries: int, padding: int, chunk_tokens: int | None, z_loss: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, rows = (torch.randn(n, 3, generator=generator).double() for n in (tokens, entries + padding))
    targets = torch.randint(0, entries, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = IGNORE_INDEX
    soft = SoftTargets(
        torch.randint(0, entries, (tokens, soft_entries), generator=generator),
        torch.randn(tokens, soft_entries, generator=generator).softmax(1)
        * (torch.rand(tokens, 1, generator=generator) < 0.7),
    )
    request = GradientBuffers(torch.tensor(0.5), z_loss, torch.full_like(hidden, 9.0), torch.ones_like(rows), 0.25)
    vocabulary = Vocabulary(entries, IGNORE_INDEX, ALONE)
    sums = linear_cross_entropy(hidden, rows, targets, vocabulary, chunk_tokens, request, soft)
    case = LinearCase(hidden, rows[:entries], targets, z_loss=z_loss, scale=0.5, soft=tuple(soft), soft_weight=0.25)
    truth, grad_hidden, of_weight = truth_of(case)
    torch.testing.assert_close(torch.stack([*sums]), truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(request.hidden, grad_hidden, rtol=1e-12, atol=1e-13)
    assert request.weight is not None
    torch.testing.assert_close(request.weight, F.pad(of_weight, (0, 0, 0, padding)) + 1, rtol=1e-12, atol=1e-13)


def test_peak_is_one_chunk() -> None:
    """Beside the logits at most 8 numbers of 8 bytes for each soft target of the chunk, and 32 for each token."""
    tokens, chunk_tokens, rows = 240, 30, 3000
    hidden, weight, targets = torch.randn(tokens, 8), torch.randn(rows, 8), torch.randint(0, rows, (tokens,))
    soft = SoftTargets(torch.randint(0, rows, (tokens, 20)), torch.rand(tokens, 20))
    request = GradientBuffers(torch.tensor(1.0), 1e-2, torch.empty_like(hidden), torch.zeros(rows, 8), 0.5)
    vocabulary = Vocabulary(rows, IGNORE_INDEX, ALONE)
    peak = peak_bytes(
        lambda: linear_cross_entropy(hidden, weight, targets, vocabulary, chunk_tokens, request, soft), hidden.device
    )
    logits = chunk_tokens * rows * 4
    assert logits <= peak <= logits + chunk_tokens * 8 * (32 + 8 * 20)


def test_look_sees_every_chunk_before_it_changes() -> None:
    case = in_dtype(random_case(), torch.float64)
    seen = torch.full((TOKENS, VOCAB_SIZE + 3), float("nan"), dtype=torch.float64)

    def look(part: slice, logits: Tensor) -> None:
        assert seen[part].isnan().all(), "once"
        seen[part] = logits

    rows = F.pad(case.weight, (0, 0, 0, 3), value=64.0)
    vocabulary = Vocabulary(VOCAB_SIZE, IGNORE_INDEX, ALONE)
    for chunk_tokens in (None, 1, 7):
        seen.fill_(float("nan"))
        request = GradientBuffers(torch.tensor(1.0), 0.0, torch.empty_like(case.hidden), torch.zeros_like(rows))
        linear_cross_entropy(case.hidden, rows, case.targets, vocabulary, chunk_tokens, request, look=look)
        torch.testing.assert_close(seen[:, :VOCAB_SIZE], case.hidden @ case.weight.T)
        assert (seen[:, VOCAB_SIZE:] < -1e300).all(), "padding is hidden"
