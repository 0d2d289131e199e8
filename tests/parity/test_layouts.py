"""The sharded model equals the plain reference at every layout, in fp32 and in bf16."""

import itertools
from typing import Any

import pytest
import torch

from mtp_dist.config import Config
from tests.errors import largest_error, norm_error
from tests.parity import comparison
from tests.parity.comparison import Layout, errors_of, layout_config, parse_case, reference_of, run_sharded
from tests.parity.runs import Run, losses_of_evaluations
from tests.ranks import Ranks

STEPS = 20
DEGREES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]
LAYOUTS = [Layout(*degrees) for degrees in DEGREES] + [Layout(*degrees, True) for degrees in DEGREES if degrees[0] > 1]
FP32 = list(itertools.product([0, 1], [1, 4], [1, 4]))
"""(ZeRO stage, micro-batches, heads)."""
FP32_PAIRS = [(0, 1, 4), (0, 4, 1), (1, 1, 1), (1, 4, 4)]
"""Every value of each with every value of each other."""
BF16 = [1, 4]
"""Micro-batches."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the full matrix if its errors are written to a file, else as much of it as shows which part is broken."""
    full = metafunc.config.getoption("--parity-json")
    if metafunc.function is test_fp32:
        cases = [(layout, *case) for layout in LAYOUTS for case in (FP32 if full else FP32_PAIRS)]
        metafunc.parametrize(("layout", "zero_stage", "micro_batches", "heads"), cases, ids=str)
    if metafunc.function is test_bf16:
        numbered = enumerate(LAYOUTS)
        cases = [(layout, count) for i, layout in numbered for count in (BF16 if full else BF16[i % 2 :: 2])]
        metafunc.parametrize(("layout", "micro_batches"), cases, ids=str)


def compared_run(ranks: Ranks, records: Any, steps: int, layout: Layout, config: Config, case: dict[str, Any]) -> Run:
    """Return a run within the bounds; record its errors."""
    run = run_sharded(ranks, config, layout, steps)
    errors = errors_of(run, reference_of(config, steps))
    records.append(
        {"layout": layout[:4], "precision": config.train.precision, **case, "steps": steps, "errors": errors}
    )
    comparison.assert_within_bounds(config, errors)
    return run


def test_fp32(
    ranks: Ranks, parity_records: Any, curve_steps: int, layout: Layout, zero_stage: int, micro_batches: int, heads: int
) -> None:
    config = layout_config(layout, micro_batches, zero_stage, heads={"count": heads})
    case = {"zero_stage": zero_stage, "accumulation": micro_batches, "heads": heads}
    compared_run(ranks, parity_records, curve_steps, layout, config, case)


def test_bf16(ranks: Ranks, parity_records: Any, curve_steps: int, layout: Layout, micro_batches: int) -> None:
    config = layout_config(layout, micro_batches, train={"precision": "bf16"})
    case = {"zero_stage": 1, "accumulation": micro_batches, "heads": 4}
    run = compared_run(ranks, parity_records, curve_steps, layout, config, case)
    assert all(weight.dtype == torch.float32 for weight in run.weights.values())


def bf16_fraction(gradients: dict[str, torch.Tensor]) -> float:
    """Return the fraction of nonzero entries that bf16 represents exactly."""
    entries = torch.cat([gradient.flatten() for gradient in gradients.values()])
    entries = entries[entries != 0]
    return float((entries.bfloat16() == entries).float().mean())


def test_bf16_gradients_are_summed_in_fp32(ranks: Ranks) -> None:
    """The micro-batches are the same at both degrees, so only the order of the sum differs."""
    names = ("tp1-pp1-dp1", "tp1-pp1-dp4 micro_batches=1")
    cases = [parse_case(f"{name} train.precision=bf16") for name in names]
    one, four = (run_sharded(ranks, config, layout, 1) for layout, config in cases)
    assert bf16_fraction(one.gradients) < 0.5, "not rounded without a sum either"
    for name, gradient in one.gradients.items():
        assert norm_error(four.gradients[name], gradient) <= 1e-5, name


def test_bf16_gradients_may_be_summed_in_bf16(ranks: Ranks) -> None:
    layout, config = parse_case("tp1-pp1-dp2 micro_batches=2 parallel.grad_reduce_dtype=bf16 train.precision=bf16")
    run = run_sharded(ranks, config, layout, 1)
    comparison.assert_within_bounds(config, errors_of(run, reference_of(config, 1)))
    assert bf16_fraction(run.gradients) == 1


@pytest.mark.parametrize(
    ("name", "precision"),
    [("tp2-pp2-dp1-sp", "bf16"), ("tp1-pp4-dp1", "bf16"), ("tp1-pp2-dp2", "fp32"), ("tp1-pp2-dp1-v", "bf16")],
)
def test_long_curve(ranks: Ranks, name: str, precision: str) -> None:
    layout, config = parse_case(f"{name} parallel.zero_stage=1 train.precision={precision}")
    run, truth = run_sharded(ranks, config, layout, STEPS), reference_of(config, STEPS)
    assert largest_error(run.losses, truth.losses) <= {"fp32": 1e-4, "bf16": 1e-2}[precision]


@pytest.mark.parametrize(
    "name", ["tp1-pp1-dp2", "tp2-pp2-dp1-sp", "tp1-pp4-dp1", "tp1-pp2-dp1-v", "tp1-pp3-dp1 heads.stages=2"]
)
def test_evaluation_between_training_steps(ranks: Ranks, name: str) -> None:
    has_all_losses = "heads.stages" not in name
    layout, config = parse_case(f"{name} heads.distillation=0.5 heads.token_order=0.5" if has_all_losses else name)
    truth = reference_of(config, 1).losses[0]
    assert not has_all_losses or ((truth[1, 1:] > 1).all() and truth[2, 0] > 1), "every kind of loss is compared"
    for before, first_step, after, twice, second_step in ranks.run(layout.world_size, losses_of_evaluations, config):
        assert largest_error(before, truth) <= 1e-5
        assert torch.equal(before, first_step)
        assert largest_error(twice, after) <= 1e-12
        assert torch.equal(after, second_step) and bool((after < before)[truth > 0].all())


@pytest.mark.parametrize(
    ("name", "precision"), [("tp1-pp1-dp1", "fp32"), ("tp2-pp2-dp1-sp", "fp32"), ("tp1-pp2-dp2", "bf16")]
)
def test_repeated_run_is_bitwise_identical(ranks: Ranks, name: str, precision: str) -> None:
    layout, config = parse_case(f"{name} train.precision={precision}")
    comparison.assert_bitwise_equal(*(run_sharded(ranks, config, layout, 3) for _ in range(2)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eager_and_recompute_are_bitwise_identical(ranks: Ranks, precision: str) -> None:
    words = [f"heads.loss_mode={mode} train.precision={precision}" for mode in ("eager", "recompute")]
    cases = [parse_case(f"tp2-pp2-dp1-sp {word}") for word in words]
    comparison.assert_bitwise_equal(*(run_sharded(ranks, config, layout, 2) for layout, config in cases))
