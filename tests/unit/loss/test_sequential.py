"""The loss of all heads equals fp64 in every mode and at every layout."""

import functools
import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config.schema import padded_vocab_size
from mtp_dist.loss import sequential
from tests.errors import norm_error
from tests.ranks import Ranks
from tests.unit.loss import toy_heads
from tests.unit.loss.harness import run_cases
from tests.unit.loss.toy_heads import MICRO_BATCHES, ToyAnswer, ToyCase, ToyHeads

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
    return run_cases(ranks, tensor, toy_heads.toy_answers, cases, sequence, MODES)


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
    case, truth = CASES[name], toy_heads.toy_truth(CASES[name])
    loss_bound, *gradient_bounds = BOUNDS[case.dtype]
    gradient_bound = gradient_bounds[mode == "naive"]
    low = case.dtype == torch.bfloat16
    for answer in by_rank:
        columns = [0] if mode == "naive" and not case.z_loss else [0, 1]
        pairs = zip([*answer.losses, *answer.sums.T[columns]], [*truth.losses, *truth.sums.T[columns]], strict=True)
        assert all(norm_error(loss, expected) <= loss_bound for loss, expected in pairs)
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


def test_fixtures_are_nontrivial() -> None:
    truth = {name: toy_heads.toy_truth(case) for name, case in CASES.items()}
    for answer in truth.values():
        assert sum(gradient is not None and bool(gradient.any()) for gradient in answer.gradients.values()) >= 6
    assert len({float(truth[name].losses[0]) for name in ("shared", "separate", Z_LOSS)}) == 3
    assert (truth["small vocabulary"].sums[:-1, 2] > 0).all(), "correct"
    grad_z = [truth[name].gradients["z.0"] for name in ("shared", "causal chain", "chain, head 2 detached")]
    for one, other in itertools.combinations([gradient for gradient in grad_z if gradient is not None], 2):
        assert norm_error(one, other) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_pass_runs_only_active_heads_and_every_hook_once(ranks: Ranks, layout: tuple[int, bool]) -> None:
    for name, by_rank in _answers(ranks, *layout).items():
        active, passes = CASES[name].active_heads, {"eager": 1, "recompute": 2, "naive": 1}
        for mode, answer in (item for answers in by_rank for item in answers.items()):
            methods = [(method, k) for method in ("pre_norm_hidden", "normalize") for k in range(1, active + 1)]
            assert answer.calls == dict.fromkeys(methods, passes[mode] * MICRO_BATCHES), (name, mode)
            assert not answer.sums[active:].any()
            # In the sequential modes also for the unused parameter, which is an input of the autograd function as well.
            params = [param for param, gradient in answer.gradients.items() if gradient is not None]
            assert answer.hooks == {param: MICRO_BATCHES for param in params if param[:2] != "z."}, (name, mode)


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


def unembedding_gradients(case: ToyCase, group: dist.ProcessGroup) -> list[tuple[int, torch.dtype]]:
    """On a rank: return, by head, the number of the tensor that adds up its unembedding's gradient, and the dtype."""
    with mock.patch.object(sequential, "linear_cross_entropy", wraps=sequential.linear_cross_entropy) as kernel:
        toy_heads.toy_loss("eager", ToyHeads(case, group), *toy_heads.micro_batch(case, 0))
    buffers = [call.args[6].weight for call in kernel.call_args_list]
    return [([id(other) for other in buffers].index(id(buffer)), buffer.dtype) for buffer in buffers]


def test_low_precision_gradients_are_summed_in_fp32(ranks: Ranks) -> None:
    expected = {"bf16": [0, 0, 0], "separate in bf16": [0, 1, 2]}
    for name, [found] in run_cases(ranks, 1, unembedding_gradients, {name: CASES[name] for name in expected}).items():
        assert found == [(tensor, torch.float32) for tensor in expected[name]], "shared: rounded after the last head"


def gradients_by_head(case: ToyCase, group: dist.ProcessGroup) -> list[dict[str, Tensor]]:
    """On a rank: return gradients of z and of what the heads share: of the whole loss, then of each head's loss."""
    answers = []
    for scales in [case.scales, *case.scales.diag()[:-1]]:
        heads, (z, targets) = ToyHeads(case, group), toy_heads.micro_batch(case, 0)
        toy_heads.toy_loss("eager", heads, z, targets, scales)[0].backward()
        found = {"z": z.grad, **heads.gradients()}
        answers.append({name: gradient for name in ("z", "a", "final_norm") if (gradient := found[name]) is not None})
    return answers


def test_low_precision_gradients_of_the_heads_are_rounded_once(ranks: Ranks) -> None:
    """Each head adds numbers of 8 bits, which fp32 adds almost exactly."""
    cases = {"": ToyCase(heads=8, dtype=torch.bfloat16)}
    [[total, *alone]] = run_cases(ranks, 1, gradients_by_head, cases)[""]
    for name, gradient in total.items():
        terms = [answer[name] for answer in alone]
        assert torch.equal(gradient, torch.stack(terms).double().sum(0).bfloat16()), name
        assert not torch.equal(gradient, functools.reduce(torch.add, terms)), "bf16 sums would differ"
