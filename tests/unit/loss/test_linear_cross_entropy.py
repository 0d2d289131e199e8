"""The chunked linear cross-entropy and the naive mode equal PyTorch in fp64, over a full or sharded vocabulary."""

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
from mtp_dist.loss import linear_cross_entropy as module
from mtp_dist.loss.linear_cross_entropy import GradientBuffers, default_chunk_tokens, linear_cross_entropy
from mtp_dist.loss.objective import HeadSums, SoftTargets, Vocabulary
from mtp_dist.model.targets import IGNORE_INDEX
from tests.errors import norm_error
from tests.ranks import Ranks
from tests.unit.loss import harness
from tests.unit.loss.harness import ALONE, SIZES, TOKENS, VOCAB_SIZE, LinearAnswer, LinearCase, fp64_truth
from tests.unit.loss.linear_cases import CASES, random_case

BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 5e-3)}
"""Relative errors of the 2-norm of sums and gradients."""
CONFIDENT_BOUNDS = {torch.float64: (1e-11, 1e-11), torch.float32: (5e-4, 1e-3), torch.bfloat16: (5e-4, 5e-3)}
"""If the targets are all but certain: rounding p close to 1 leaves less of 1 - p."""
SOFT_BOUNDS = BOUNDS | {torch.float64: (1e-11, 1e-11)}
STEEP_BOUND = 1e-3
"""For the gradient of hidden if weights of 10^4 multiply the rounding of the softmax."""
NAIVE = {
    name: case
    for name, case in CASES.items()
    if case.hidden.dtype == torch.float32 and not (case.start or case.frozen or case.soft)
}


@functools.cache
def _answers(ranks: Ranks, size: int) -> dict[str, list[LinearAnswer]]:
    return harness.run_cases(ranks, size, harness.kernel_answer, CASES)


def assert_equals_fp64(name: str, found: list[LinearAnswer]) -> None:
    case, (sums, grad_hidden, grad_weight) = CASES[name], fp64_truth(CASES[name])
    bounds = CONFIDENT_BOUNDS if "confident" in name else SOFT_BOUNDS if case.soft else BOUNDS
    sum_bound, gradient_bound = bounds[case.hidden.dtype]
    for answer in found:
        assert torch.equal(answer.sums, found[0].sums), "every rank has the same bits"
    for index in (0, 1, 3, 4):
        if index != 1 or case.z_loss or found[0].sums[1]:  # the naive mode computes the term only for the z-loss
            assert norm_error(found[0].sums[index], sums[index]) <= sum_bound
    assert torch.equal(found[0].sums[[2, 5]].double(), sums[[2, 5]]), "correct, targets"
    hidden = torch.stack([answer.hidden.double() for answer in found]).sum(0)
    assert norm_error(hidden, grad_hidden) <= (STEEP_BOUND if name == "soft, steep, small losses" else gradient_bound)
    assert not hidden[~grad_hidden.any(1)].any(), "positions without any target"
    if case.frozen:
        assert all(answer.weight is None for answer in found)
        return
    weight = torch.cat([answer.weight for answer in found if answer.weight is not None]) - case.start
    assert norm_error(weight[: len(case.weight)], grad_weight) <= gradient_bound
    assert not weight[len(case.weight) :].any(), "padding"


@pytest.mark.parametrize("size", SIZES)
def test_equals_autograd_in_fp64(ranks: Ranks, size: int) -> None:
    for name, found in _answers(ranks, size).items():
        assert_equals_fp64(name, found)


@pytest.mark.parametrize("size", SIZES)
def test_naive_sums_equal_autograd_in_fp64(ranks: Ranks, size: int) -> None:
    for name, found in harness.run_cases(ranks, size, harness.naive_answer, NAIVE).items():
        assert_equals_fp64(name, found)


def test_fixtures_are_nontrivial() -> None:
    sums = {name: fp64_truth(case)[0] for name, case in CASES.items()}
    assert sums["ties"][2] == 3, "of 16 targets that no other token is above"
    assert sums["almost ties"][2] == sums["almost ties"][5] == 16
    assert sums["steep"][2] == 2 and sums["steep"][0] > 2e4 and sums["soft, steep"][3] > 2e4
    assert 0 < sums["confident"][0] < 0.01 * 2 * 16 and sums["confident"][2] == TOKENS
    assert sums["random"][0] > 50 and 8 <= sums["masked"][5] < 20 and sums["soft alone"][3] > 50
    assert 0.5 < sums["soft, steep, small losses"][3] < 0.6, "out of logits of 10^4"
    assert 5 < sums["total variation with targets"][4] < sums["total variation alone"][4] < TOKENS
    assert (~fp64_truth(CASES["some positions of either"])[1].any(1)).any(), "positions with neither"
    for name in ("no valid target", "no positions"):
        assert not any(tensor.any() for tensor in fp64_truth(CASES[name])), "exactly 0, and so is what is compared"


@pytest.mark.parametrize("size", SIZES)
def test_one_collective_per_chunk(ranks: Ranks, size: int) -> None:
    chunks = {"random": 1, "chunks of 3": 9, "one position per chunk": TOKENS}
    chunks |= {"soft alone": 1, "soft, chunks of 3": 9, "soft, one position per chunk": TOKENS}
    for name, count in chunks.items():
        expected = {"allgather_base": count} if size > 1 else {}
        assert all(answer.collectives == (expected, expected) for answer in _answers(ranks, size)[name])
    expected = {"allgather_base": 9, "allreduce": 9} if size > 1 else {}
    answers = _answers(ranks, size)["total variation, chunks of 3"]
    assert all(answer.collectives == (expected, expected) for answer in answers), "one more for the total variation"


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
        token_ids = torch.randint(0, vocab_size, (tokens, soft_tokens), generator=generator)
        case.soft = SoftTargets(token_ids, probabilities * counted)
    found, (truth, grad_hidden, grad_weight) = harness.kernel_answer(case, ALONE, rows), fp64_truth(case)
    assert found.weight is not None
    padded = F.pad(grad_weight, (0, 0, 0, padding)) + 1
    for value, expected in [(found.sums, truth), (found.hidden, grad_hidden), (found.weight, padded)]:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


def test_losses_over_a_large_vocabulary_have_no_bias() -> None:
    """PyTorch's softmax on a CPU adds in plain fp32: over 50,000 trained logits its denominator is 2e-6 too small."""
    vocab_size, tokens = 49_152, 32
    logits = torch.randn(tokens, vocab_size, generator=torch.Generator().manual_seed(5)) * 6
    case = LinearCase(torch.eye(tokens), logits.T.contiguous(), logits.argmax(1))
    loss, truth = harness.kernel_answer(case, ALONE).sums[0].double(), fp64_truth(case)[0][0]
    assert abs(float(loss - truth)) / tokens < 1e-6


def test_callback_gets_every_chunk_before_it_changes() -> None:
    case = random_case(7).to(torch.float64)

    def on_logits(positions: slice, logits: Tensor) -> None:
        assert seen[positions].isnan().all(), "once"
        seen[positions] = logits

    rows = F.pad(case.weight, (0, 0, 0, 3), value=64.0)
    for chunk_tokens in (None, 1, 7):
        seen = torch.full((TOKENS, VOCAB_SIZE + 3), float("nan"), dtype=torch.float64)
        harness.kernel_answer(replace(case, chunk_tokens=chunk_tokens), ALONE, rows, [on_logits])
        torch.testing.assert_close(seen[:, :VOCAB_SIZE], case.hidden @ case.weight.T)
        assert (seen[:, VOCAB_SIZE:] < -1e300).all(), "padding is hidden"


SMALL_VECTORS = 32 * 8
"""Bytes per position of a chunk for everything except `[C, V]` and `[C, D]`: at most 32 numbers of 8 bytes."""
CHUNK = 30


def kernel_peak(
    rows: int,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    gradients: bool = True,
    soft_tokens: int = 0,
    chunk: int | None = CHUNK,
) -> int:
    """Return the peak memory of the kernel in chunks of that many positions."""
    tokens = 240
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(rows, width).to(dtype)
    targets, vocabulary = torch.randint(0, rows, (tokens,)), Vocabulary(rows, IGNORE_INDEX, ALONE)
    soft, grads, sums = None, None, torch.zeros(len(HeadSums.COLUMNS))
    if soft_tokens:
        soft = SoftTargets(torch.randint(0, rows, (tokens, soft_tokens)), torch.rand(tokens, soft_tokens))
    if gradients:
        grads = GradientBuffers(torch.tensor(1.0), 1e-2, torch.empty_like(hidden), torch.zeros(rows, width), 0.5)
    return peak_bytes(
        lambda: linear_cross_entropy(hidden, weight, targets, vocabulary, sums, chunk, grads, soft), hidden.device
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
    assert 7 * rows * 4 <= kernel_peak(rows, gradients=False, chunk=None) <= budget + 7 * SMALL_VECTORS
