"""Heads one after the other give what all at once give, and what fp64 gives, at every layout."""

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config.schema import padded_vocab_size
from tests.errors import norm_error
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.loss.toy_heads import (
    BATCH,
    LENGTH,
    MICRO_BATCHES,
    ToyAnswer,
    ToyCase,
    active_heads,
    backward_twice,
    gradient_dtypes,
    gradients_by_head,
    runs_of_heads,
    sums_without_gradients,
    toy_answers,
    toy_truth,
)

SEQUENTIAL = ["eager", "recompute"]
MODES = [*SEQUENTIAL, "naive"]
LAYOUTS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
"""(tensor, sequence)."""
Z_LOSS = "z-loss, a shorter last chunk"
CASES = {
    "shared": ToyCase(),
    "separate": ToyCase(separate=True),
    Z_LOSS: ToyCase(heads=2, z_loss=1e-2, chunk_tokens=5),
    "separate, z-loss, one chunk": ToyCase(separate=True, z_loss=1e-2, chunk_tokens=None),
    "one head": ToyCase(heads=1),
    "small vocabulary": ToyCase(vocab_size=3),
    "not contiguous": ToyCase(batch_first=True),
    "frozen layers": ToyCase(heads=2, frozen=("matrix", "a")),
    "frozen unembedding": ToyCase(heads=2, frozen=("unembedding",)),
    "frozen separate unembeddings": ToyCase(heads=2, frozen=("unembedding",), separate=True),
    "frozen trunk": ToyCase(heads=2, frozen=("z",)),
    "bf16": ToyCase(dtype=torch.bfloat16),
    "separate in bf16": ToyCase(dtype=torch.bfloat16, separate=True, z_loss=1e-2),
    "causal chain": ToyCase(chain="causal", separate=True, z_loss=1e-2),
    "anticausal chain": ToyCase(chain="anticausal", batch_first=True),
    "chain, head 2 detached": ToyCase(chain="causal", detached=(2,)),
    "chain, frozen trunk": ToyCase(chain="causal", frozen=("z", "a")),
    "chain in bf16": ToyCase(chain="causal", dtype=torch.bfloat16),
    "heads 2 and 3 detached": ToyCase(detached=(2, 3)),
    "2 of 3 active": ToyCase(active=2, separate=True),
    "chain, 1 of 3 active": ToyCase(chain="causal", active=1),
    "chain, 2 of 3 active, detached": ToyCase(chain="causal", active=2, detached=(2,), z_loss=1e-2),
}
BOUNDS = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (2e-3, 2e-2)}
"""Of losses and gradients against fp64, relative, of the 2-norm."""
FEW_RANKS = {
    name for name, case in CASES.items() if case.frozen or case.chain != "none" or case.detached or case.active
}
"""What is no matter of more ranks, which cost seconds."""
RUNS = [(layout, name) for layout in LAYOUTS for name in CASES if layout[0] < 4 or name not in FEW_RANKS]
CHUNKS = -(-LENGTH * BATCH // 13)


@functools.cache
def _answers(ranks: Ranks, tensor: int, sequence: bool) -> dict[str, list[dict[str, ToyAnswer]]]:
    """By case, what each rank's modes gave."""
    config = tiny_config(parallel={"tensor": tensor, "sequence": sequence}, model={"num_query_groups": 4})
    names = [name for layout, name in RUNS if layout == (tensor, sequence)]
    by_rank = ranks.run(tensor, toy_answers, config, [CASES[name] for name in names], MODES)
    return dict(zip(names, (list(answers) for answers in zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("mode", SEQUENTIAL)
@pytest.mark.parametrize(("layout", "name"), RUNS, ids=str)
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
            if is_frozen(CASES[name], weight):
                assert gradient is None and truth_or_none is None, weight
                continue
            assert gradient is not None, weight
            if truth_or_none is None:
                assert not gradient.any(), "no active head uses it"
                continue
            assert gradient.dtype == truth_or_none.dtype
            assert norm_error(gradient, truth_or_none) <= (3e-2 if low else 2e-6), weight


def is_frozen(case: ToyCase, weight: str) -> bool:
    return weight.split(".")[0] in case.frozen


def of_rank(name: str, truth: Tensor, rank: int, ranks: int, sequence: bool) -> Tensor:
    """What the rank should hold of the whole gradient."""
    if name.startswith("unembedding"):
        rows = padded_vocab_size(len(truth), ranks)
        return F.pad(truth, (0, 0, 0, rows - len(truth))).chunk(ranks)[rank]
    return truth.chunk(ranks)[rank] if sequence and name.startswith("z.") else truth


def summed_where_partial(name: str, by_rank: list[Tensor], sequence: bool) -> list[Tensor]:
    """Under sequence parallelism each rank knows its own positions only, so what they share needs the sum over ranks.

    Training takes it too (`mtp_dist.engine.gradients`).
    """
    if sequence and not name.startswith(("unembedding", "z.")):
        return [torch.stack([gradient.double() for gradient in by_rank]).sum(0)]
    return by_rank


@pytest.mark.parametrize("mode", SEQUENTIAL)
@pytest.mark.parametrize(("layout", "name"), RUNS, ids=str)
def test_equals_fp64_on_one_rank(ranks: Ranks, layout: tuple[int, bool], name: str, mode: str) -> None:
    by_rank = [answers[mode] for answers in _answers(ranks, *layout)[name]]
    case, truth = CASES[name], toy_truth(CASES[name])
    loss_bound, gradient_bound = BOUNDS[case.dtype]
    for answer in by_rank:
        for loss, expected in zip([*answer.losses, answer.sums[0]], [*truth.losses, truth.sums[0]], strict=True):
            assert norm_error(loss, expected) <= loss_bound
        assert torch.equal(answer.sums[2], truth.sums[2])
        assert case.dtype == torch.bfloat16 or torch.equal(answer.sums[1], truth.sums[1])
        assert answer.gradients.keys() == truth.gradients.keys()
    for weight, expected in truth.gradients.items():
        found = [gradient for answer in by_rank if (gradient := answer.gradients[weight]) is not None]
        assert len(found) == (0 if is_frozen(case, weight) else len(by_rank)), weight
        if expected is None:
            assert not any(gradient.any() for gradient in found), "no active head uses it"
        else:
            for rank, gradient in enumerate(summed_where_partial(weight, found, layout[1])):
                wanted = of_rank(weight, expected, rank, *layout)
                assert norm_error(gradient, wanted) <= gradient_bound, (weight, rank)


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
        assert {weight for weight in gradients if gradients[weight] is None} >= {*frozen}
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients.values()) >= 6
    assert len({float(answers[name][0]["eager"].losses[0]) for name in ("shared", "separate", Z_LOSS)}) == 3
    assert (answers["small vocabulary"][0]["eager"].sums[1] > 0).all(), "hits"


def once_a_pass(answer: ToyAnswer) -> Counter[str]:
    """Every weight with a gradient, as often as there were backward passes."""
    names = [name for name, gradient in answer.gradients.items() if gradient is not None and name[:2] != "z."]
    return Counter(dict.fromkeys(names, MICRO_BATCHES))


@pytest.mark.parametrize("mode", SEQUENTIAL)
def test_hooks_after_the_accumulation_run_once_a_backward_pass(ranks: Ranks, mode: str) -> None:
    for case in ("shared", "separate", "frozen layers"):
        answer = _answers(ranks, 1, False)[case][0][mode]
        # That of the unused weight too, although there is nothing to add: it is an input of the function as well.
        assert answer.hooks == once_a_pass(answer) and answer.hooks["unused"] == MICRO_BATCHES


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


@pytest.mark.parametrize("name", ["2 of 3 active", "chain, 1 of 3 active", "causal chain", "anticausal chain"])
def test_only_active_heads_run(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    active = range(1, active_heads(case) + 1)
    (runs,) = ranks.run(1, runs_of_heads, tiny_config(), case, MODES)
    once = Counter({(what, head): 1 for what in ("state", "hidden") for head in active})
    assert runs == {"eager": once, "recompute": once + once, "naive": once}
    for mode in MODES:
        answer = _answers(ranks, 1, False)[name][0][mode]
        assert all(sums[: len(active)].any() and not sums[len(active) :].any() for sums in answer.sums[::2])
        for head in range(len(active) + 1, case.heads + 1):
            names = {f"matrix.{head}", f"norm.{head}", f"unembedding.{head}"} & answer.gradients.keys()
            own = [answer.gradients[weight] for weight in names]
            assert len(own) >= 2 and not any(gradient is not None and gradient.any() for gradient in own)


def test_chains_and_detached_heads_change_the_gradients(ranks: Ranks) -> None:
    of_z = {
        name: _answers(ranks, 1, False)[name][0]["eager"].gradients["z.0"]
        for name in ("shared", "chain, head 2 detached", "heads 2 and 3 detached", "chain, 1 of 3 active")
    }
    shared, chain, heads, one = of_z.values()
    assert shared is not None and chain is not None and heads is not None and one is not None
    assert torch.equal(chain, heads) and torch.equal(heads, one), "z hears of head 1 only"
    assert norm_error(shared, one) > 0.1


def test_only_sums_without_gradients(ranks: Ranks) -> None:
    case = CASES[Z_LOSS]
    (answers,) = ranks.run(1, sums_without_gradients, tiny_config(), case, MODES)
    (_, eager), (_, recompute), (_, naive) = answers
    assert not any(has_graph for has_graph, _ in answers)
    assert all(torch.equal(one, other) for one, other in zip(eager, recompute, strict=True))
    for one, other in zip(eager, naive, strict=True):
        assert norm_error(one, other) <= 1e-6


def test_second_backward_pass_raises(ranks: Ranks) -> None:
    (raised,) = ranks.run(1, backward_twice, tiny_config(), CASES["shared"], MODES)
    for mode in SEQUENTIAL:
        assert raised[mode].startswith("RuntimeError: a second backward pass through the heads' loss")
    assert raised["naive"] != "nothing"


def test_low_precision_gradients_are_summed_in_fp32(ranks: Ranks) -> None:
    cases = [CASES["bf16"], CASES["separate in bf16"]]
    ((shared, separate),) = ranks.run(1, gradient_dtypes, tiny_config(), cases)
    assert shared == [(0, torch.float32)] * 3, "one sum for all heads, rounded after the last"
    assert separate == [(head, torch.float32) for head in range(3)]


def test_low_precision_gradients_of_the_heads_are_rounded_once(ranks: Ranks) -> None:
    """What each head adds has 8 bits, so that fp32 adds them exactly, or all but."""
    ((total, *alone),) = ranks.run(1, gradients_by_head, tiny_config(), ToyCase(heads=8, dtype=torch.bfloat16))
    for name, gradient in total.items():
        terms = [answer[name] for answer in alone]
        assert torch.equal(gradient, torch.stack(terms).double().sum(0).bfloat16()), name
        assert not torch.equal(gradient, functools.reduce(torch.add, terms)), "bf16 would have been seen"
