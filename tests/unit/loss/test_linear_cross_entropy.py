"""The chunked linear cross-entropy equals PyTorch's in fp64, gradients included, over a whole and a cut vocabulary."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mtp_dist.bench.measure import peak_bytes
from mtp_dist.loss import linear_cross_entropy as module
from mtp_dist.loss.linear_cross_entropy import GradientBuffers, Vocabulary, default_chunk_tokens, linear_cross_entropy
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

CONFIDENT_BOUNDS = {torch.float64: (1e-11, 1e-11), torch.float32: (5e-4, 1e-3), torch.bfloat16: (5e-4, 5e-3)}
"""Where the targets are all but certain: rounding p close to 1 leaves less of 1 - p."""


def random_case() -> LinearCase:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator) * 0.7
    return LinearCase(hidden, weight, torch.randint(0, VOCAB_SIZE, (TOKENS,), generator=generator))


def steep_case() -> LinearCase:
    """Logits 10^4, -10^4 and 0, exact in fp32: the target is certain, impossible or one of many equal ones."""
    hidden, weight = steep_logits()
    return LinearCase(hidden, weight, torch.tensor([7, 7, 70, 130, 70, 0]))


def confident_case() -> LinearCase:
    """Targets of probability about 0.999, over all ranks: bf16 has nothing between 0.996 and 1."""
    hidden = torch.eye(WIDTH).repeat(2, 1)[:TOKENS]
    weight = random_case().weight * 0.3
    targets = torch.arange(WIDTH) * 8 + 3
    weight[targets, torch.arange(WIDTH)] = 12.0
    return LinearCase(hidden, weight, targets.repeat(2)[:TOKENS])


def tied_case() -> LinearCase:
    """Logits 0, 1 and 2 in several entries and ranks each: targets that share the first place, or have it alone."""
    generator = torch.Generator().manual_seed(9)
    hidden = torch.eye(WIDTH)
    weight = torch.randint(0, 3, (VOCAB_SIZE, WIDTH), generator=generator).float()
    targets = weight.argmax(0)
    alone = torch.tensor([0, 5, 12])
    targets[alone] = torch.tensor([0, 66, 130])
    weight[targets[alone], alone] = 3.0
    return LinearCase(hidden, weight, targets)


def real_cases() -> dict[str, LinearCase]:
    case = random_case()
    uneven = torch.rand(TOKENS, generator=torch.Generator().manual_seed(6)) < torch.linspace(0, 1, TOKENS)
    only, close = torch.full((TOKENS,), IGNORE_INDEX), torch.tensor([2, 4])
    masked = replace(case, targets=case.targets.masked_fill(uneven, IGNORE_INDEX))
    cases = {
        "random": case,
        "z-loss": replace(case, z_loss=1e-2),
        "masked": masked,
        "masked, z-loss": replace(masked, z_loss=1e-2),
        "one valid target": replace(case, targets=only.index_fill(0, torch.tensor([11]), 66)),
        "one valid target of z-loss": replace(case, targets=only.index_fill(0, torch.tensor([0]), 3), z_loss=1e-2),
        "no valid target": replace(case, targets=only, z_loss=1e-2),
        "every token the same": replace(case, hidden=case.hidden[:1].repeat(TOKENS, 1), targets=case.targets * 0 + 65),
        "steep": steep_case(),
        # Losses near 1 out of logits of 10^4, with no larger loss to hide the digits that a careless sum loses.
        "steep, small losses": replace(steep_case(), targets=only[:6].index_copy(0, close, torch.tensor([70, 70]))),
        "steep, z-loss": replace(steep_case(), z_loss=1e-2),
        "the last real entry": replace(case, targets=case.targets * 0 + VOCAB_SIZE - 1),
        "one token a chunk": replace(masked, chunk_tokens=1, z_loss=1e-2),
        "chunks of 3": replace(masked, chunk_tokens=3, z_loss=1e-2),
        "chunk larger than all": replace(masked, chunk_tokens=1000, z_loss=1e-2),
        "frozen": replace(masked, frozen=True),
        "added": replace(masked, start=0.125, chunk_tokens=3),
        "large scale": replace(masked, scale=7.0, z_loss=1e-2),
        "ties": tied_case(),
        "confident": confident_case(),
    }
    cases |= {f"{name} in bf16": in_dtype(cases[name], torch.bfloat16) for name in ("random", "masked, z-loss")}
    cases |= {f"{name} in bf16": in_dtype(cases[name], torch.bfloat16) for name in ("chunks of 3", "confident")}
    exact = ("random", "masked, z-loss", "steep", "chunks of 3", "confident")
    return cases | {f"{name} in fp64": in_dtype(cases[name], torch.float64) for name in exact}


@functools.cache
def _answers(ranks: Ranks, size: int) -> dict[str, list[LinearAnswer]]:
    return answers_of(ranks, size, real_cases())


@pytest.mark.parametrize("name", real_cases())
@pytest.mark.parametrize("size", SIZES)
def test_equals_autograd_in_fp64(ranks: Ranks, size: int, name: str) -> None:
    case = real_cases()[name]
    bounds = (CONFIDENT_BOUNDS if "confident" in name else BOUNDS)[case.hidden.dtype]
    found = _answers(ranks, size)[name]
    assert_equals_fp64(case, found, bounds)
    assert found[0].sums[3] == 0, "no soft targets"
    for answer in found:
        assert not answer.hidden[case.targets == IGNORE_INDEX].any(), "masked"


def test_cases_say_something() -> None:
    truths = {name: truth_of(case)[0] for name, case in real_cases().items()}
    assert truths["ties"][2] == 3, "of 16 targets that no other entry is above"
    assert truths["steep"][2] == 2 and truths["steep"][0] > 2e4
    assert 0 < truths["confident"][0] < 0.01 * 2 * WIDTH and truths["confident"][2] == TOKENS
    assert truths["random"][0] > 50 and int((real_cases()["masked"].targets != IGNORE_INDEX).sum()) in range(8, 20)


@pytest.mark.parametrize("size", SIZES)
def test_no_valid_target_gives_exactly_0(ranks: Ranks, size: int) -> None:
    for answer in _answers(ranks, size)["no valid target"]:
        assert answer.weight is not None
        assert not answer.sums.any() and not answer.hidden.any() and not answer.weight.any()


@pytest.mark.parametrize("size", SIZES)
def test_one_collective_a_chunk(ranks: Ranks, size: int) -> None:
    assert_one_collective_a_chunk(
        _answers(ranks, size), {"random": 1, "chunks of 3": 9, "one token a chunk": TOKENS}, size
    )


@hypothesis_settings(max_examples=60)
@given(
    tokens=st.integers(1, 9),
    entries=st.integers(1, 12),
    padding=st.integers(0, 3),
    chunk_tokens=st.one_of(st.none(), st.integers(1, 11)),
    z_loss=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 99),
)
def test_any_shape(tokens: int, entries: int, padding: int, chunk_tokens: int | None, z_loss: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, rows = (torch.randn(n, 3, generator=generator).double() for n in (tokens, entries + padding))
    targets = torch.randint(0, entries, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = IGNORE_INDEX
    request = GradientBuffers(torch.tensor(0.5), z_loss, torch.full_like(hidden, 9.0), torch.ones_like(rows))
    vocabulary = Vocabulary(entries, IGNORE_INDEX, ALONE)
    sums = linear_cross_entropy(hidden, rows, targets, vocabulary, chunk_tokens, request)
    case = LinearCase(hidden, rows[:entries], targets, z_loss=z_loss, scale=0.5)
    truth, grad_hidden, of_weight = truth_of(case)
    torch.testing.assert_close(torch.stack([*sums]), truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(request.hidden, grad_hidden, rtol=1e-12, atol=1e-13)
    assert request.weight is not None
    torch.testing.assert_close(request.weight, F.pad(of_weight, (0, 0, 0, padding)) + 1, rtol=1e-12, atol=1e-13)


def test_losses_over_a_large_vocabulary_have_no_bias() -> None:
    """PyTorch's softmax on a CPU adds in plain fp32: over 50,000 trained logits its denominator is 2e-6 too small."""
    entries, tokens = 49_152, 32
    logits = torch.randn(tokens, entries, generator=torch.Generator().manual_seed(5)) * 6
    targets = logits.argmax(1)
    vocabulary = Vocabulary(entries, IGNORE_INDEX, ALONE)
    found = linear_cross_entropy(torch.eye(tokens), logits.T.contiguous(), targets, vocabulary).cross_entropy
    truth = F.cross_entropy(logits.double(), targets, reduction="sum")
    assert abs(float(found.double() - truth)) / tokens < 1e-6


def test_inputs_with_gradients_get_no_graph() -> None:
    case = random_case()
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    request = GradientBuffers(torch.tensor(1.0), 1e-2, torch.empty_like(hidden), torch.zeros_like(weight))
    assert request.weight is not None
    vocabulary = Vocabulary(VOCAB_SIZE, IGNORE_INDEX, ALONE)
    sums = linear_cross_entropy(hidden, weight, case.targets, vocabulary, 7, request)
    for result in (*sums, request.hidden, request.weight):
        assert not result.requires_grad and result.grad_fn is None
    assert hidden.grad is None and weight.grad is None


SMALL_VECTORS = 32 * 8
"""Bytes per token of a chunk for everything that is not `[C, V]` or `[C, D]`: at most 32 numbers of 8 bytes."""


@pytest.mark.parametrize("rows", [3000, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_one_chunk(dtype: torch.dtype, rows: int) -> None:
    """With bf16 on a CPU the peak includes copies in fp32 that a GPU does not need: see `_matmul_into`.

    Where D < C the copy of the logits' gradient is the largest one, else that of the weight.
    """
    tokens, chunk_tokens = 240, 30
    width = 8 if rows == 3000 else 64
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(rows, width).to(dtype)
    targets = torch.randint(0, rows, (tokens,))
    request = GradientBuffers(torch.tensor(1.0), 1e-2, torch.empty_like(hidden), torch.zeros(rows, width))
    vocabulary = Vocabulary(rows, IGNORE_INDEX, ALONE)
    peak = peak_bytes(
        lambda: linear_cross_entropy(hidden, weight, targets, vocabulary, chunk_tokens, request), hidden.device
    )
    logits = chunk_tokens * rows * 4
    expected = logits
    if dtype == torch.bfloat16:
        expected += logits // 2 + 4 * chunk_tokens * width + max(4 * rows * width, logits)
    assert logits <= peak <= expected + chunk_tokens * SMALL_VECTORS


def test_peak_without_gradients() -> None:
    hidden, weight, targets = torch.randn(240, 8), torch.randn(3000, 8), torch.randint(0, 3000, (240,))
    vocabulary, logits = Vocabulary(3000, IGNORE_INDEX, ALONE), 30 * 3000 * 4
    peak = peak_bytes(lambda: linear_cross_entropy(hidden, weight, targets, vocabulary, 30), hidden.device)
    assert logits <= peak <= logits + 30 * SMALL_VECTORS


def test_default_chunk_fits_into_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert default_chunk_tokens(4096, torch.float32, cpu) == 64 * 2**20 // (4096 * 4)
    assert default_chunk_tokens(4096, torch.bfloat16, cpu) == default_chunk_tokens(4096, torch.float32, cpu)
    assert default_chunk_tokens(4096, torch.float64, cpu) == 64 * 2**20 // (4096 * 8)
    assert default_chunk_tokens(4096, torch.bfloat16, torch.device("cuda")) == 2**30 // (4096 * 4)
    assert default_chunk_tokens(2**30, torch.float32, cpu) == 1
    rows, budget = 500, 7 * 500 * 4 + 100
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", budget)
    hidden, weight, targets = torch.randn(50, 4), torch.randn(rows, 4), torch.randint(0, rows, (50,))
    vocabulary = Vocabulary(rows, IGNORE_INDEX, ALONE)
    peak = peak_bytes(lambda: linear_cross_entropy(hidden, weight, targets, vocabulary), cpu)
    assert 7 * rows * 4 <= peak <= budget + 7 * SMALL_VECTORS
