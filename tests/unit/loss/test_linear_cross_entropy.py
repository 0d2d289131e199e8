"""The chunked linear cross-entropy and the naive mode equal PyTorch in fp64, over a full or sharded vocabulary."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_dist.bench.measure import peak_bytes
from mtp_dist.loss import linear_cross_entropy as module
from mtp_dist.loss.linear_cross_entropy import GradientBuffers, default_chunk_tokens, linear_cross_entropy
from mtp_dist.loss.objective import HeadSums, SoftTargets, Vocabulary
from mtp_dist.model.targets import IGNORE_INDEX
from tests.ranks import Ranks
from tests.unit.loss.harness import (
    ALONE,
    SIZES,
    TOKENS,
    VOCAB_SIZE,
    LinearAnswer,
    LinearCase,
    assert_equals_fp64,
    fp64_truth,
    kernel_answer,
    kernel_answers,
    naive_answers,
    run_cases,
)
from tests.unit.loss.linear_cases import random_case, soft_case, soft_cases, target_cases

BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 5e-3)}
"""Relative errors of the 2-norm of sums and gradients."""
CONFIDENT_BOUNDS = {torch.float64: (1e-11, 1e-11), torch.float32: (5e-4, 1e-3), torch.bfloat16: (5e-4, 5e-3)}
"""If the targets are all but certain: rounding p close to 1 leaves less of 1 - p."""
SOFT_BOUNDS = BOUNDS | {torch.float64: (1e-11, 1e-11)}
STEEP_BOUND = 1e-3
"""For the gradient of hidden if weights of 10^4 multiply the rounding of the softmax."""
NAIVE = [name for name, case in target_cases().items() if case.hidden.dtype == torch.float32 and not case.start]


@functools.cache
def _answers(ranks: Ranks, size: int) -> dict[str, list[LinearAnswer]]:
    return run_cases(ranks, size, kernel_answers, target_cases())


@functools.cache
def _soft_answers(ranks: Ranks, size: int) -> dict[str, list[LinearAnswer]]:
    return run_cases(ranks, size, kernel_answers, soft_cases())


@functools.cache
def _naive_answers(ranks: Ranks, size: int) -> dict[str, list[LinearAnswer]]:
    cases = target_cases()
    return run_cases(ranks, size, naive_answers, {name: cases[name] for name in NAIVE if not cases[name].frozen})


@pytest.mark.parametrize("size", SIZES)
def test_equals_autograd_in_fp64(ranks: Ranks, size: int) -> None:
    for name, case in target_cases().items():
        found = _answers(ranks, size)[name]
        assert_equals_fp64(case, found, (CONFIDENT_BOUNDS if "confident" in name else BOUNDS)[case.hidden.dtype])
        assert found[0].sums[3] == 0, "no soft targets"
        assert not any(answer.hidden[case.targets == IGNORE_INDEX].any() for answer in found), "masked"


@pytest.mark.parametrize("size", SIZES)
def test_soft_targets_equal_autograd_in_fp64(ranks: Ranks, size: int) -> None:
    for name, case in soft_cases().items():
        hidden_bound = STEEP_BOUND if name == "steep, small losses" else None
        assert_equals_fp64(case, _soft_answers(ranks, size)[name], SOFT_BOUNDS[case.hidden.dtype], hidden_bound)


@pytest.mark.parametrize("size", SIZES)
def test_naive_sums_equal_autograd_in_fp64(ranks: Ranks, size: int) -> None:
    for name, found in _naive_answers(ranks, size).items():
        case = target_cases()[name]
        assert_equals_fp64(case, found, (CONFIDENT_BOUNDS if "confident" in name else BOUNDS)[torch.float32])
        assert not any(answer.hidden[case.targets == IGNORE_INDEX].any() for answer in found), "masked"


def test_fixtures_are_nontrivial() -> None:
    sums = {name: fp64_truth(case)[0] for name, case in target_cases().items()}
    assert sums["ties"][2] == 3, "of 16 targets that no other token is above"
    assert sums["almost ties"][2] == sums["almost ties"][4] == 16
    assert sums["steep"][2] == 2 and sums["steep"][0] > 2e4
    assert 0 < sums["confident"][0] < 0.01 * 2 * 16 and sums["confident"][2] == TOKENS
    assert sums["random"][0] > 50 and 8 <= sums["masked"][4] < 20
    soft = {name: fp64_truth(case) for name, case in soft_cases().items()}
    assert 0.5 < soft["steep, small losses"][0][3] < 0.6, "out of logits of 10^4"
    assert soft["steep"][0][3] > 2e4 and soft["soft alone"][0][3] > 50
    assert (~soft["some positions of either"][1].any(1)).any(), "positions with neither"


@pytest.mark.parametrize("size", SIZES)
def test_nothing_to_predict_gives_exactly_0(ranks: Ranks, size: int) -> None:
    naive = _naive_answers(ranks, size)["no valid target"]
    for answer in _answers(ranks, size)["no valid target"] + _soft_answers(ranks, size)["no positions"] + naive:
        assert answer.weight is not None
        assert not answer.sums.any() and not answer.hidden.any() and not answer.weight.any()


@pytest.mark.parametrize("size", SIZES)
def test_one_collective_per_chunk(ranks: Ranks, size: int) -> None:
    answers, soft_answers = _answers(ranks, size), _soft_answers(ranks, size)
    for found, chunks in [
        (answers["random"], 1),
        (answers["chunks of 3"], 9),
        (answers["one position per chunk"], TOKENS),
        (soft_answers["soft alone"], 1),
        (soft_answers["chunks of 3"], 9),
        (soft_answers["one position per chunk"], TOKENS),
    ]:
        expected = {"allgather_base": chunks} if size > 1 else {}
        assert all(answer.collectives == (expected, expected) for answer in found)


@hypothesis_settings(max_examples=100)
@given(
    tokens=st.integers(1, 9),
    vocab_size=st.integers(1, 12),
    soft_tokens=st.integers(0, 15),
    padding=st.integers(0, 3),
    chunk_tokens=st.one_of(st.none(), st.integers(1, 11)),
    z_loss=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 99),
)
def test_any_shape(
    tokens: int, vocab_size: int, soft_tokens: int, padding: int, chunk_tokens: int | None, z_loss: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, rows = (torch.randn(n, 3, generator=generator).double() for n in (tokens, vocab_size + padding))
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = IGNORE_INDEX
    case = LinearCase(hidden, rows[:vocab_size], targets, chunk_tokens, z_loss, scale=0.5, start=1.0)
    if soft_tokens:
        probabilities = torch.randn(tokens, soft_tokens, generator=generator).softmax(1)
        case.soft_weight, counted = 0.25, torch.rand(tokens, 1, generator=generator) < 0.7
        case.soft = torch.randint(0, vocab_size, (tokens, soft_tokens), generator=generator), probabilities * counted
    found = kernel_answer(case, rows, ALONE)
    truth, grad_hidden, grad_weight = fp64_truth(case)
    assert found.weight is not None
    padded = F.pad(grad_weight, (0, 0, 0, padding)) + 1
    for value, expected in [(found.sums, truth), (found.hidden, grad_hidden), (found.weight, padded)]:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


def test_losses_over_a_large_vocabulary_have_no_bias() -> None:
    """PyTorch's softmax on a CPU adds in plain fp32: over 50,000 trained logits its denominator is 2e-6 too small."""
    vocab_size, tokens = 49_152, 32
    logits = torch.randn(tokens, vocab_size, generator=torch.Generator().manual_seed(5)) * 6
    targets = logits.argmax(1)
    vocabulary = Vocabulary(vocab_size, IGNORE_INDEX, ALONE)
    sums = torch.zeros(len(HeadSums.COLUMNS))
    linear_cross_entropy(torch.eye(tokens), logits.T.contiguous(), targets, vocabulary, sums)
    truth = F.cross_entropy(logits.double(), targets, reduction="sum")
    assert abs(float(sums[0].double() - truth)) / tokens < 1e-6


def test_inputs_with_gradients_get_no_graph() -> None:
    case = random_case()
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    grads = GradientBuffers(torch.tensor(1.0), 1e-2, torch.empty_like(hidden), torch.zeros_like(weight))
    assert grads.weight is not None
    vocabulary = Vocabulary(VOCAB_SIZE, IGNORE_INDEX, ALONE)
    sums = torch.zeros(len(HeadSums.COLUMNS))
    linear_cross_entropy(hidden, weight, case.targets, vocabulary, sums, 7, grads)
    for result in (sums, grads.hidden, grads.weight):
        assert not result.requires_grad and result.grad_fn is None
    assert hidden.grad is None and weight.grad is None


def test_callback_gets_every_chunk_before_it_changes() -> None:
    case = soft_case().to(torch.float64)
    seen = torch.full((TOKENS, VOCAB_SIZE + 3), float("nan"), dtype=torch.float64)

    def on_logits(positions: slice, logits: Tensor) -> None:
        assert seen[positions].isnan().all(), "once"
        seen[positions] = logits

    rows = F.pad(case.weight, (0, 0, 0, 3), value=64.0)
    vocabulary = Vocabulary(VOCAB_SIZE, IGNORE_INDEX, ALONE)
    for chunk_tokens in (None, 1, 7):
        seen.fill_(float("nan"))
        grads = GradientBuffers(torch.tensor(1.0), 0.0, torch.empty_like(case.hidden), torch.zeros_like(rows))
        sums = torch.zeros(len(HeadSums.COLUMNS), dtype=torch.float64)
        linear_cross_entropy(
            case.hidden, rows, case.targets, vocabulary, sums, chunk_tokens, grads, on_logits=on_logits
        )
        torch.testing.assert_close(seen[:, :VOCAB_SIZE], case.hidden @ case.weight.T)
        assert (seen[:, VOCAB_SIZE:] < -1e300).all(), "padding is hidden"


SMALL_VECTORS = 32 * 8
"""Bytes per position of a chunk for everything except `[C, V]` and `[C, D]`: at most 32 numbers of 8 bytes."""
CHUNK = 30


def kernel_peak(
    rows: int, width: int = 8, dtype: torch.dtype = torch.float32, gradients: bool = True, soft_tokens: int = 0
) -> int:
    """Return the peak memory of the kernel in chunks of CHUNK positions."""
    tokens = 240
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(rows, width).to(dtype)
    targets, vocabulary = torch.randint(0, rows, (tokens,)), Vocabulary(rows, IGNORE_INDEX, ALONE)
    soft, grads, sums = None, None, torch.zeros(len(HeadSums.COLUMNS))
    if soft_tokens:
        soft = SoftTargets(torch.randint(0, rows, (tokens, soft_tokens)), torch.rand(tokens, soft_tokens))
    if gradients:
        grads = GradientBuffers(torch.tensor(1.0), 1e-2, torch.empty_like(hidden), torch.zeros(rows, width), 0.5)
    return peak_bytes(
        lambda: linear_cross_entropy(hidden, weight, targets, vocabulary, sums, CHUNK, grads, soft), hidden.device
    )


@pytest.mark.parametrize(("rows", "width"), [(3000, 8), (300, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_one_chunk(dtype: torch.dtype, rows: int, width: int) -> None:
    """With bf16 on a CPU the peak includes copies in fp32 that a GPU does not need: see `_matmul_into`.

    If D < C the copy of the logits' gradient is the largest one, otherwise that of the weight.
    """
    logits = CHUNK * rows * 4
    expected = logits
    if dtype == torch.bfloat16:
        expected += logits // 2 + 4 * CHUNK * width + max(4 * rows * width, logits)
    assert logits <= kernel_peak(rows, width, dtype) <= expected + CHUNK * SMALL_VECTORS


def test_peak_without_gradients_and_with_soft_targets() -> None:
    """In addition to the logits at most 8 numbers of 8 bytes for each soft target of the chunk."""
    logits = CHUNK * 3000 * 4
    assert logits <= kernel_peak(3000, gradients=False) <= logits + CHUNK * SMALL_VECTORS
    assert logits <= kernel_peak(3000, soft_tokens=20) <= logits + CHUNK * (SMALL_VECTORS + 8 * 8 * 20)


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
    sums = torch.zeros(len(HeadSums.COLUMNS))
    peak = peak_bytes(lambda: linear_cross_entropy(hidden, weight, targets, vocabulary, sums), cpu)
    assert 7 * rows * 4 <= peak <= budget + 7 * SMALL_VECTORS
