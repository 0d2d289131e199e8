"""Heads one after the other give what all at once give, for the memory of one."""

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.parity.runs import tiny_config
from tests.ranks import Ranks
from tests.unit.loss.toy_heads import (
    BATCH,
    LENGTH,
    MICRO_BATCHES,
    ToyAnswer,
    ToyCase,
    backward_twice,
    peak_bytes,
    sums_without_gradients,
    toy_answers,
)

SEQUENTIAL = ["eager", "recompute"]
MODES = [*SEQUENTIAL, "naive"]
LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
"""(tensor, sequence)."""
CASES = {
    "shared": ToyCase(),
    "separate": ToyCase(separate=True),
    "z-loss": ToyCase(z_loss=1e-2),
    "separate, z-loss, one chunk": ToyCase(separate=True, z_loss=1e-2, chunk_tokens=None),
    "one head": ToyCase(heads=1),
    "small vocabulary": ToyCase(vocab_size=3),
    "frozen layers": ToyCase(frozen=("matrix", "a")),
    "frozen unembedding": ToyCase(frozen=("unembedding",)),
    "frozen separate unembeddings": ToyCase(frozen=("unembedding",), separate=True),
    "frozen trunk": ToyCase(frozen=("z",)),
    "bf16": ToyCase(dtype=torch.bfloat16),
    "separate in bf16": ToyCase(dtype=torch.bfloat16, separate=True, z_loss=1e-2),
}
CHUNKS = -(-LENGTH * BATCH // 7)


@functools.cache
def _answers(ranks: Ranks, tensor: int, sequence: bool) -> dict[str, list[dict[str, ToyAnswer]]]:
    """By case, what each rank's modes gave."""
    config = tiny_config(parallel={"tensor": tensor, "sequence": sequence}, model={"num_query_groups": 4})
    by_rank = ranks.run(tensor, toy_answers, config, list(CASES.values()), MODES)
    return dict(zip(CASES, (list(answers) for answers in zip(*by_rank, strict=True)), strict=True))


def norm_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("mode", SEQUENTIAL)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_all_heads_at_once(ranks: Ranks, layout: tuple[int, bool], name: str, mode: str) -> None:
    low = CASES[name].dtype == torch.bfloat16
    for answers in _answers(ranks, *layout)[name]:
        found, naive = answers[mode], answers["naive"]
        # Both round: the reference its logits too, where they are bf16.
        for loss, truth in zip(found.losses, naive.losses, strict=True):
            assert norm_error(loss, truth) <= (2e-3 if low else 1e-6)
        assert norm_error(found.sums[0], naive.sums[0]) <= (2e-3 if low else 1e-6)
        assert torch.equal(found.sums[2], naive.sums[2]) and (low or torch.equal(found.sums[1], naive.sums[1]))
        assert found.gradients.keys() == naive.gradients.keys()
        for weight, truth_or_none in naive.gradients.items():
            gradient = found.gradients[weight]
            if gradient is None or truth_or_none is None:
                assert gradient is None and truth_or_none is None, weight
                continue
            assert gradient.dtype == truth_or_none.dtype
            assert norm_error(gradient, truth_or_none) <= (3e-2 if low else 2e-6), weight


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_eager_equals_recompute_bit_for_bit(ranks: Ranks, layout: tuple[int, bool]) -> None:
    for name, by_rank in _answers(ranks, *layout).items():
        for answers in by_rank:
            eager, recompute = (answers[mode] for mode in SEQUENTIAL)
            for one, other in zip(eager.losses + eager.sums, recompute.losses + recompute.sums, strict=True):
                assert torch.equal(one, other), name
            for weight, gradient in eager.gradients.items():
                again = recompute.gradients[weight]
                assert (gradient is None and again is None) or torch.equal(gradient, again), (name, weight)


def test_cases_say_something(ranks: Ranks) -> None:
    answers = _answers(ranks, 1, False)
    for name, frozen in {"shared": [], "frozen layers": ["a", "matrix.1"], "frozen trunk": ["z.0", "z.1"]}.items():
        gradients = answers[name][0]["eager"].gradients
        assert {weight for weight in gradients if gradients[weight] is None} >= {"unused", *frozen}
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients.values()) >= 6
    assert len({float(answers[name][0]["eager"].losses[0]) for name in ("shared", "separate", "z-loss")}) == 3
    assert (answers["small vocabulary"][0]["eager"].sums[1] > 0).all(), "hits"


def once_a_pass(answer: ToyAnswer) -> Counter[str]:
    """Every weight with a gradient, as often as there were backward passes."""
    names = [name for name, gradient in answer.gradients.items() if gradient is not None and name[:2] != "z."]
    return Counter(dict.fromkeys(names, MICRO_BATCHES))


@pytest.mark.parametrize("mode", SEQUENTIAL)
def test_hooks_after_the_accumulation_run_once_a_backward_pass(ranks: Ranks, mode: str) -> None:
    for case in ("shared", "separate", "frozen layers"):
        answer = _answers(ranks, 1, False)[case][0][mode]
        # That of the unused weight runs although there is nothing to add: it is an input of the function too.
        assert answer.hooks == once_a_pass(answer) + Counter({"unused": MICRO_BATCHES})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_reduction_of_the_hidden_gradient_a_head(ranks: Ranks, layout: tuple[int, bool]) -> None:
    tensor, sequence = layout
    forward, both = Counter[str](), Counter[str]()
    if tensor > 1:
        forward = Counter({"allgather_base": CHUNKS + sequence})
        both = forward + Counter({"reduce_scatter_base" if sequence else "allreduce": 1})
    for case in ("shared", "separate", "one head"):
        heads = CASES[case].heads
        for answers in _answers(ranks, *layout)[case]:
            times_heads = [Counter({name: heads * n for name, n in counts.items()}) for counts in (forward, both)]
            assert answers["eager"].collectives == [times_heads[1], Counter()]
            assert answers["recompute"].collectives == times_heads


def test_only_sums_without_gradients(ranks: Ranks) -> None:
    case = CASES["z-loss"]
    (answers,) = ranks.run(1, sums_without_gradients, tiny_config(), case, MODES)
    (_, eager), (_, recompute), (_, naive) = answers
    assert not any(has_graph for has_graph, _ in answers)
    assert all(torch.equal(one, other) for one, other in zip(eager, recompute, strict=True))
    for one, other in zip(eager, naive, strict=True):
        assert norm_error(one, other) <= 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_second_backward_pass_raises(ranks: Ranks, mode: str) -> None:
    assert ranks.run(1, backward_twice, tiny_config(), CASES["shared"], mode) != ["nothing"]


LOGITS_DOMINATE = ToyCase(chunk_tokens=32, length=64, batch=4, width=32, vocab_size=4000)
LOGITS_OF_A_HEAD = 4 * 64 * 4 * 4000


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mode", SEQUENTIAL)
def test_memory_is_that_of_one_head(ranks: Ranks, mode: str, separate: bool) -> None:
    """Peaks beyond the gradients themselves."""
    peaks = {
        heads: ranks.run(1, peak_bytes, tiny_config(), replace(LOGITS_DOMINATE, heads=heads, separate=separate), mode)
        for heads in (1, 8)
    }
    (one,), (eight,) = peaks[1], peaks[8]
    assert one < LOGITS_OF_A_HEAD / 2, "one chunk of 8, and little else"
    assert eight <= 1.02 * one
    (naive,) = ranks.run(1, peak_bytes, tiny_config(), replace(LOGITS_DOMINATE, heads=8, separate=separate), "naive")
    assert naive >= 8 * max(LOGITS_OF_A_HEAD, eight)
