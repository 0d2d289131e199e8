"""Heads one after the other take the memory of one."""

import functools
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.loss.toy_heads import ToyCase, peaks

LOGITS_DOMINATE = ToyCase(chunk_tokens=32, length=64, batch=4, width=32, vocab_size=4032)
"""A vocabulary that needs no padding."""
LOGITS_OF_A_HEAD = 4 * 64 * 4 * 4032
WEIGHTS_DOMINATE = replace(LOGITS_DOMINATE, heads=6, chunk_tokens=4, length=8)
FROZEN = replace(WEIGHTS_DOMINATE, frozen=("unembedding",))
SEQUENTIAL = ["eager", "recompute"]
CHAIN = replace(LOGITS_DOMINATE, width=4)
CHAINS = ["causal", "anticausal"]
KEPT_OF_A_BLOCK = 8 * 4 * CHAIN.length * CHAIN.batch * CHAIN.width
"""Bytes of 8 tensors `[S, B, D]`: its state, the gradient of that, and what autograd saves of it."""
DTYPES = [torch.float32, torch.bfloat16]
FIRST_RUNS = [
    *(
        (replace(LOGITS_DOMINATE, heads=n, separate=s), mode)
        for n, s, mode in product((1, 8), (False, True), SEQUENTIAL)
    ),
    *((replace(LOGITS_DOMINATE, heads=8, separate=s), "naive") for s in (False, True)),
    *((replace(CHAIN, heads=n, chain=c), m) for n, c, m in product((1, 8), CHAINS, SEQUENTIAL)),
    *((replace(CHAIN, heads=8, chain=c), "naive") for c in CHAINS),
]
LATER_RUNS = [
    *((replace(WEIGHTS_DOMINATE, separate=s, dtype=d), m) for s, d, m in product((False, True), DTYPES, SEQUENTIAL)),
    *((FROZEN, mode) for mode in SEQUENTIAL),
]


@functools.cache
def _peaks(ranks: Ranks) -> dict[tuple[ToyCase, str], list[int]]:
    (first,) = ranks.run(1, peaks, tiny_config(), FIRST_RUNS, 1)
    (later,) = ranks.run(1, peaks, tiny_config(), LATER_RUNS, 2)
    return dict(zip(FIRST_RUNS + LATER_RUNS, first + later, strict=True))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mode", SEQUENTIAL)
def test_memory_is_that_of_one_head(ranks: Ranks, mode: str, separate: bool) -> None:
    """Peaks beyond the gradients themselves."""
    found, case = _peaks(ranks), replace(LOGITS_DOMINATE, separate=separate)
    one, eight = (found[replace(case, heads=heads), mode][0] for heads in (1, 8))
    assert one < LOGITS_OF_A_HEAD / 2, "one chunk of 8, and little else"
    assert eight <= 1.02 * one
    assert found[replace(case, heads=8), "naive"][0] >= 8 * max(LOGITS_OF_A_HEAD, eight)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("mode", SEQUENTIAL)
def test_chains_keep_their_blocks_and_no_logits(ranks: Ranks, mode: str, chain: str) -> None:
    found, case = _peaks(ranks), replace(CHAIN, chain=chain)
    one, eight = (found[replace(case, heads=heads), mode][0] for heads in (1, 8))
    assert one < LOGITS_OF_A_HEAD / 2
    assert one > 2 * 7 * KEPT_OF_A_BLOCK, "one more chunk of logits would be found"
    assert eight <= 1.05 * one + 7 * KEPT_OF_A_BLOCK
    assert found[replace(case, heads=8), "naive"][0] >= 8 * LOGITS_OF_A_HEAD


def bytes_of_weights(case: ToyCase) -> tuple[int, int]:
    """Those of one unembedding, and of all weights that get a gradient, in the case's precision."""
    unembedding = case.vocab_size * case.width
    others = 3 * case.width + case.heads * (case.width**2 + case.width)
    total = (case.heads if case.separate else 1) * unembedding + others
    return unembedding * case.dtype.itemsize, total * case.dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mode", SEQUENTIAL)
def test_later_micro_batches_hold_one_more_copy_of_the_gradients(
    ranks: Ranks, mode: str, separate: bool, dtype: torch.dtype
) -> None:
    """Where `.grad` exists, what is added to it is there in full until the backward pass: that is by design.

    Beside it live one chunk and one head's graph: too little to hide a second copy of one unembedding's gradient.
    """
    case = replace(WEIGHTS_DOMINATE, separate=separate, dtype=dtype)
    of_unembedding, of_all = bytes_of_weights(case)
    logits = case.chunk_tokens * case.vocab_size * 4
    # z, its gradients, what autograd saves of one head, and the small vectors of a chunk.
    slack = 16 * case.length * case.batch * case.width * 4
    bound = of_all + logits + slack
    if dtype == torch.bfloat16:
        # The sum of the head at work is in fp32 until it is done: beyond its bf16, that once more. The kernel adds the
        # logits' gradient in bf16, and on a CPU an fp32 copy of the unembedding.
        bound += of_unembedding + logits // 2 + 2 * of_unembedding
    else:
        assert logits + slack < of_unembedding
    second = _peaks(ranks)[case, mode][1]
    assert of_all <= second <= bound


@pytest.mark.parametrize("mode", SEQUENTIAL)
def test_frozen_unembedding_takes_no_memory_for_a_gradient(ranks: Ranks, mode: str) -> None:
    assert max(_peaks(ranks)[FROZEN, mode]) < bytes_of_weights(FROZEN)[0]
