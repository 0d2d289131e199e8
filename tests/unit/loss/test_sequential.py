"""The loss of all heads equals fp64 in every mode and at every layout."""

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
from tests.unit.loss.harness import run_cases
from tests.unit.loss.toy_heads import (
    MICRO_BATCHES,
    ToyAnswer,
    ToyCase,
    gradient_dtypes,
    gradients_by_head,
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
BOUNDS = {torch.float32: (1e-6, 1e-6, 2e-6), torch.bfloat16: (2e-3, 2e-2, 3e-2)}
"""Relative errors of the 2-norm of losses, and of gradients in the sequential modes and in `naive`."""
FEW_RANKS = {n for n, case in CASES.items() if case.frozen or case.chain != "none" or case.detached or case.active}
"""Cases that do not depend on the number of ranks; 4 ranks cost seconds."""
RUNS = [(layout, name) for layout in LAYOUTS for name in CASES if layout[0] < 4 or name not in FEW_RANKS]


@functools.cache
def _answers(ranks: Ranks, tensor: int, sequence: bool) -> dict[str, list[dict[str, ToyAnswer]]]:
    """Return the answers by case, rank and mode."""
    cases = {name: CASES[name] for layout, name in RUNS if layout == (tensor, sequence)}
    return run_cases(ranks, tensor, toy_answers, cases, MODES, sequence=sequence)


def expected_on_rank(name: str, truth: Tensor, rank: int, ranks: int, sequence: bool) -> Tensor:
    """Return the part of the full gradient that belongs on the rank."""
    if name.startswith("unembedding"):
        rows = padded_vocab_size(len(truth), ranks)
        return F.pad(truth, (0, 0, 0, rows - len(truth))).chunk(ranks)[rank]
    return truth.chunk(ranks)[rank] if sequence and name.startswith("z.") else truth


def summed_if_partial(name: str, by_rank: list[Tensor], sequence: bool) -> list[Tensor]:
    """Sum over the ranks what each computes from its own positions only, as training does (engine/gradients.py)."""
    if sequence and not name.startswith(("unembedding", "z.")):
        return [torch.stack([gradient.double() for gradient in by_rank]).sum(0)]
    return by_rank


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("layout", "name"), RUNS, ids=str)
def test_equals_fp64_on_one_rank(ranks: Ranks, layout: tuple[int, bool], name: str, mode: str) -> None:
    by_rank = [answers[mode] for answers in _answers(ranks, *layout)[name]]
    case, truth = CASES[name], toy_truth(CASES[name])
    loss_bound, *gradient_bounds = BOUNDS[case.dtype]
    gradient_bound = gradient_bounds[mode == "naive"]
    low = case.dtype == torch.bfloat16
    for answer in by_rank:
        for loss, expected in zip([*answer.losses, answer.sums[:, 0]], [*truth.losses, truth.sums[:, 0]], strict=True):
            assert norm_error(loss, expected) <= loss_bound
        assert torch.equal(answer.sums[:, 3:], truth.sums[:, 3:]), "no soft targets, the same valid ones"
        assert low or torch.equal(answer.sums[:, 2], truth.sums[:, 2]), "correct"
        assert answer.gradients.keys() == truth.gradients.keys()
    for param, expected in truth.gradients.items():
        found = [gradient for answer in by_rank if (gradient := answer.gradients[param]) is not None]
        unused_by_autograd = mode == "naive" and expected is None
        assert len(found) == (0 if case.is_frozen(param) or unused_by_autograd else len(by_rank)), param
        if expected is None:
            assert not any(gradient.any() for gradient in found), "no active head uses it"
            continue
        assert all(gradient.dtype == case.dtype for gradient in found)
        for rank, gradient in enumerate(summed_if_partial(param, found, layout[1])):
            error = norm_error(gradient, expected_on_rank(param, expected, rank, *layout))
            assert error <= gradient_bound, (param, rank)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_eager_equals_recompute_bitwise(ranks: Ranks, layout: tuple[int, bool]) -> None:
    for name, by_rank in _answers(ranks, *layout).items():
        for answers in by_rank:
            eager, recompute = (answers[mode] for mode in SEQUENTIAL)
            assert torch.equal(eager.sums, recompute.sums)
            assert all(torch.equal(*pair) for pair in zip(eager.losses, recompute.losses, strict=True)), name
            for param, gradient in eager.gradients.items():
                again = recompute.gradients[param]
                assert (gradient is None and again is None) or torch.equal(gradient, again), (name, param)


def test_fixtures_are_nontrivial(ranks: Ranks) -> None:
    answers = _answers(ranks, 1, False)
    for name, frozen in {"shared": [], "frozen layers": ["a", "matrix.1"], "frozen trunk": ["z.0", "z.1"]}.items():
        gradients = answers[name][0]["eager"].gradients
        assert {param for param in gradients if gradients[param] is None} >= {*frozen}
        assert sum(gradient is not None and bool(gradient.any()) for gradient in gradients.values()) >= 6
    assert len({float(answers[name][0]["eager"].losses[0]) for name in ("shared", "separate", Z_LOSS)}) == 3
    assert (answers["small vocabulary"][0]["eager"].sums[:-1, 2] > 0).all(), "correct"


@pytest.mark.parametrize("mode", SEQUENTIAL)
def test_post_accumulation_hooks_run_once_per_backward_pass(ranks: Ranks, mode: str) -> None:
    for case in ("shared", "separate", "frozen layers"):
        answer = _answers(ranks, 1, False)[case][0][mode]
        params = [name for name, gradient in answer.gradients.items() if gradient is not None and name[:2] != "z."]
        # Also for the unused parameter, which is an input of the autograd function as well.
        assert answer.hooks == Counter(dict.fromkeys(params, MICRO_BATCHES)) and "unused" in params


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_reduction_of_the_hidden_gradient_per_head(ranks: Ranks, layout: tuple[int, bool]) -> None:
    tensor, sequence = layout
    forward, both = Counter[str](), Counter[str]()
    if tensor > 1:
        chunks = -(-8 * 3 // 13)
        forward = Counter({"allgather_base": chunks + sequence})
        both = forward + Counter({"reduce_scatter_base" if sequence else "allreduce": 1})
    for case in ("shared", "separate", "one head"):
        heads = CASES[case].heads
        for answers in _answers(ranks, *layout)[case]:
            times_heads = [Counter({name: heads * n for name, n in counts.items()}) for counts in (forward, both)]
            assert answers["eager"].collectives == [times_heads[1], Counter()]
            assert answers["recompute"].collectives == times_heads


@pytest.mark.parametrize("name", ["2 of 3 active", "chain, 1 of 3 active", "causal chain", "anticausal chain"])
def test_only_active_heads_run(ranks: Ranks, name: str) -> None:
    case, answers = CASES[name], _answers(ranks, 1, False)[name][0]
    active = case.active_heads
    for mode, runs in {"eager": 1, "recompute": 2, "naive": 1}.items():
        answer = answers[mode]
        methods = ("pre_norm_hidden", "normalize")
        expected = {(method, head): runs * MICRO_BATCHES for method in methods for head in range(1, active + 1)}
        assert answer.calls == expected
        assert answer.sums[:active, 0].all() and not answer.sums[active:].any()
        for head in range(active + 1, case.heads + 1):
            names = {f"matrix.{head}", f"norm.{head}", f"unembedding.{head}"} & answer.gradients.keys()
            own = [answer.gradients[param] for param in names]
            assert len(own) >= 2 and not any(gradient is not None and gradient.any() for gradient in own)


def test_chains_and_detached_heads_change_the_gradients(ranks: Ranks) -> None:
    grad_z = [
        _answers(ranks, 1, False)[name][0]["eager"].gradients["z.0"]
        for name in ("shared", "chain, head 2 detached", "heads 2 and 3 detached", "chain, 1 of 3 active")
    ]
    shared, chain, heads, one = (gradient for gradient in grad_z if gradient is not None)
    assert torch.equal(chain, heads) and torch.equal(heads, one), "only head 1 reaches z"
    assert norm_error(shared, one) > 0.1


def test_only_sums_without_gradients(ranks: Ranks) -> None:
    for answer in _answers(ranks, 1, False)[Z_LOSS][0].values():
        loss, sums = answer.evaluation
        assert not loss.requires_grad and torch.equal(loss, answer.losses[-1])
        assert sums[:, 4].sum() and not sums.requires_grad


def test_second_backward_pass_raises(ranks: Ranks) -> None:
    answers = _answers(ranks, 1, False)["shared"][0]
    for mode in SEQUENTIAL:
        assert answers[mode].second_backward.startswith("RuntimeError: a second backward pass through the heads' loss")
    assert answers["naive"].second_backward


def test_low_precision_gradients_are_summed_in_fp32(ranks: Ranks) -> None:
    for name, buffers in {"bf16": [0, 0, 0], "separate in bf16": [0, 1, 2]}.items():
        (found,) = ranks.run(1, gradient_dtypes, tiny_config(), CASES[name])
        assert found == [(buffer, torch.float32) for buffer in buffers], "a shared sum is rounded after the last head"


def test_low_precision_gradients_of_the_heads_are_rounded_once(ranks: Ranks) -> None:
    """Each head adds numbers of 8 bits, which fp32 adds almost exactly."""
    ((total, *alone),) = ranks.run(1, gradients_by_head, tiny_config(), ToyCase(heads=8, dtype=torch.bfloat16))
    for name, gradient in total.items():
        terms = [answer[name] for answer in alone]
        assert torch.equal(gradient, torch.stack(terms).double().sum(0).bfloat16()), name
        assert not torch.equal(gradient, functools.reduce(torch.add, terms)), "bf16 sums would differ"
