"""Heads one after the other take the memory of one."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from mtp_dist.bench.measure import peak_bytes
from tests.ranks import Ranks
from tests.unit.loss.harness import run_cases
from tests.unit.loss.toy_heads import ToyCase, ToyHeads, micro_batch, toy_loss

LOGITS_DOMINATE = ToyCase(chunk_tokens=32, length=64, batch=4, width=32, vocab_size=4032)
"""A vocabulary that needs no padding."""
HEAD_LOGITS = 4 * 64 * 4 * 4032
"""Bytes of one head's logits."""
WEIGHTS_DOMINATE = replace(LOGITS_DOMINATE, heads=6, chunk_tokens=4, length=8)
CHAIN = replace(LOGITS_DOMINATE, width=4)
BLOCK = 8 * 4 * CHAIN.length * CHAIN.batch * CHAIN.width
"""Bytes of 8 tensors `[S, B, D]`: a block's output, its gradient, and what autograd saves of it."""
sequential = pytest.mark.parametrize("mode", ["eager", "recompute"])


def peaks(case: ToyCase, group: dist.ProcessGroup, mode: str, micro_batches: int) -> list[int]:
    """On a rank: return the peak memory of every micro-batch's forward and backward pass.

    The first micro-batch's does not count the gradients, which it allocates and which stay.
    """
    heads, found = ToyHeads(case, group), []
    for index in range(micro_batches):
        z, targets = micro_batch(case, index)
        found.append(peak_bytes(lambda z=z, targets=targets: toy_loss(mode, heads, z, targets)[0].backward(), z.device))
    found[0] -= sum(gradient.nbytes for gradient in heads.gradients().values() if gradient is not None)
    return found


@pytest.fixture(scope="module")
def peak(ranks: Ranks) -> Callable[[ToyCase, str, int], int]:
    """Return the peak memory of the n-th micro-batch, from 0."""

    @functools.cache
    def measure(case: ToyCase, mode: str, index: int = 0) -> int:
        [found] = run_cases(ranks, 1, peaks, {"": case}, mode, index + 1)[""]
        return found[index]

    return measure


@pytest.mark.parametrize("separate", [False, True])
@sequential
def test_memory_is_that_of_one_head(peak: Callable[..., int], mode: str, separate: bool) -> None:
    case = replace(LOGITS_DOMINATE, separate=separate)
    one, eight = (peak(replace(case, heads=heads), mode) for heads in (1, 8))
    assert one < HEAD_LOGITS / 2, "one chunk of 8, and little else"
    assert eight <= 1.02 * one
    assert peak(replace(case, heads=8), "naive") >= 8 * max(HEAD_LOGITS, eight)


@pytest.mark.parametrize("chain", ["causal", "anticausal"])
@sequential
def test_chains_keep_their_blocks_and_no_logits(peak: Callable[..., int], mode: str, chain: str) -> None:
    one, eight = (peak(replace(CHAIN, chain=chain, heads=heads), mode) for heads in (1, 8))
    assert one < HEAD_LOGITS / 2
    assert one > 2 * 7 * BLOCK, "one more chunk of logits would be found"
    assert eight <= 1.05 * one + 7 * BLOCK
    assert peak(replace(CHAIN, chain=chain, heads=8), "naive") >= 8 * HEAD_LOGITS


def parameter_bytes(case: ToyCase) -> tuple[int, int]:
    """Return the bytes of one unembedding, and of all parameters with a gradient, in the case's precision."""
    unembedding = case.vocab_size * case.width
    others = 3 * case.width + case.heads * (case.width**2 + case.width)
    total = (case.heads if case.separate else 1) * unembedding + others
    return unembedding * case.dtype.itemsize, total * case.dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("separate", [False, True])
@sequential
def test_later_micro_batches_hold_one_more_copy_of_the_gradients(
    peak: Callable[..., int], mode: str, separate: bool, dtype: torch.dtype
) -> None:
    """If `.grad` exists, what is added to it is there in full until the backward pass, by design.

    In addition there are one chunk and one head's graph: too little to hide a second copy of an unembedding's gradient.
    """
    case = replace(WEIGHTS_DOMINATE, separate=separate, dtype=dtype)
    unembedding, everything = parameter_bytes(case)
    logits = case.chunk_tokens * case.vocab_size * 4
    # z, its gradients, what autograd saves of one head, and the small vectors of a chunk.
    slack = 16 * case.length * case.batch * case.width * 4
    bound = everything + logits + slack
    if dtype == torch.bfloat16:
        # The sum of the head at work is in fp32 until it is done: beyond its bf16, that once more. The kernel adds the
        # logits' gradient in bf16, and on a CPU an fp32 copy of the unembedding.
        bound += unembedding + logits // 2 + 2 * unembedding
    else:
        assert logits + slack < unembedding
    assert everything <= peak(case, mode, 1) <= bound


@sequential
def test_frozen_unembedding_takes_no_memory_for_a_gradient(peak: Callable[..., int], mode: str) -> None:
    case = replace(WEIGHTS_DOMINATE, frozen=("unembedding",))
    assert max(peak(case, mode), peak(case, mode, 1)) < parameter_bytes(case)[0]
