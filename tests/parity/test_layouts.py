"""The sharded model equals the plain reference, whatever the layout."""

import itertools
from typing import Any

import pytest
import torch

from mtp_dist.config.schema import padded_vocab_size
from tests.errors import largest_error, norm_error
from tests.parity.comparison import (
    assert_equals_reference,
    assert_within_bounds,
    errors_of,
    layout_config,
    name_of,
    reference_of,
    run_sharded,
)
from tests.parity.runs import losses_of_evaluations, run_with_broken_gradient
from tests.ranks import Ranks
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE, VOCAB_SIZE

STEPS = 20
FEW = 3
"""Steps of the tests whose question one step almost answers."""
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]
"""(tensor, pipeline, data)."""
SEQUENCE_PARALLEL = [(tensor, pipeline, data, True) for tensor, pipeline, data in LAYOUTS if tensor > 1]
ALL_LAYOUTS = [(*layout, False) for layout in LAYOUTS] + SEQUENCE_PARALLEL


FP32 = list(itertools.product([0, 1], [1, 4], [1, 4]))
"""(ZeRO stage, micro-batches, heads)."""
FP32_PAIRS = [(0, 1, 4), (0, 4, 1), (1, 1, 1), (1, 4, 4)]
"""Every value of each with every value of each other."""
BF16 = [1, 4]
"""Micro-batches."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The whole matrix where its errors are to be written down, else as much of it as shows which part is broken."""
    whole = metafunc.config.getoption("--parity-json")
    if metafunc.function is test_fp32:
        cases = [(layout, *case) for layout in ALL_LAYOUTS for case in (FP32 if whole else FP32_PAIRS)]
        metafunc.parametrize(("layout", "zero_stage", "accumulation", "heads"), cases, ids=_id_of)
    if metafunc.function is test_bf16:
        chosen = [BF16 if whole else [BF16[index % 2]] for index in range(len(ALL_LAYOUTS))]
        cases = [(layout, count) for layout, counts in zip(ALL_LAYOUTS, chosen, strict=True) for count in counts]
        metafunc.parametrize(("layout", "accumulation"), cases, ids=_id_of)


def _id_of(value: Any) -> str:
    return name_of(value) if isinstance(value, tuple) else str(value)


def test_fp32(
    ranks: Ranks, parity_records: Any, curve_steps: int, layout: Any, zero_stage: int, accumulation: int, heads: int
) -> None:
    config = layout_config(layout, accumulation, zero_stage, heads={"count": heads})
    errors = errors_of(run_sharded(ranks, config, layout, curve_steps), reference_of(config, curve_steps))
    case = {"precision": "fp32", "zero_stage": zero_stage, "accumulation": accumulation, "heads": heads}
    parity_records.append({"layout": layout, **case, "steps": curve_steps, "errors": errors})
    assert_within_bounds(config, errors)


def test_bf16(ranks: Ranks, parity_records: Any, curve_steps: int, layout: Any, accumulation: int) -> None:
    config = layout_config(layout, accumulation, train={"precision": "bf16"})
    run = run_sharded(ranks, config, layout, curve_steps)
    errors = errors_of(run, reference_of(config, curve_steps))
    case = {"precision": "bf16", "zero_stage": 1, "accumulation": accumulation, "heads": 4}
    parity_records.append({"layout": layout, **case, "steps": curve_steps, "errors": errors})
    assert_within_bounds(config, errors)
    assert all(weight.dtype == torch.float32 for weight in run.weights.values())


def share_of_bf16_numbers(gradients: dict[str, torch.Tensor]) -> float:
    entries = torch.cat([gradient.flatten() for gradient in gradients.values()])
    entries = entries[entries != 0]
    return float((entries.bfloat16() == entries).float().mean())


def test_bf16_gradients_are_summed_in_fp32(ranks: Ranks) -> None:
    """The micro-batches are the same at both degrees, so only the order of the sum differs."""
    layouts = [(1, 1, data, False) for data in (1, 4)]
    configs = [layout_config(layout, 4 // layout[2], train={"precision": "bf16"}) for layout in layouts]
    one, four = (run_sharded(ranks, config, layout, 1) for config, layout in zip(configs, layouts, strict=True))
    assert share_of_bf16_numbers(one.gradients) < 0.5, "nor are they rounded where nothing is summed"
    for name, gradient in one.gradients.items():
        assert norm_error(four.gradients[name], gradient) <= 1e-5, name


def test_bf16_gradients_may_be_summed_in_bf16(ranks: Ranks) -> None:
    layout = (1, 1, 2, False)
    config = layout_config(layout, 2, parallel={"grad_reduce_dtype": "bf16"}, train={"precision": "bf16"})
    run = run_sharded(ranks, config, layout, 1)
    assert_within_bounds(config, errors_of(run, reference_of(config, 1)))
    assert share_of_bf16_numbers(run.gradients) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [(2, 2, 1, True), (1, 4, 1, False), (1, 2, 2, False)], ids=name_of)
def test_long_curve(ranks: Ranks, layout: Any, precision: str) -> None:
    config = layout_config(layout, 4, zero_stage=1, train={"precision": precision})
    run, truth = run_sharded(ranks, config, layout, STEPS), reference_of(config, STEPS)
    assert largest_error(run.losses, truth.losses) <= {"fp32": 1e-4, "bf16": 1e-2}[precision]


@pytest.mark.parametrize(("checkpointing", "sequence"), list(itertools.product(["selective", "full"], [False, True])))
def test_activation_checkpointing_changes_nothing(ranks: Ranks, checkpointing: str, sequence: bool) -> None:
    layout = (2, 2, 1, sequence)
    config = layout_config(layout, 4, train={"activation_checkpointing": checkpointing})
    assert_equals_reference(ranks, config, layout, FEW)


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("layout", [(1, 1, 1, False), (2, 2, 1, True), (1, 2, 2, False), (1, 4, 1, False)], ids=name_of)
def test_tied_embeddings(ranks: Ranks, layout: Any, zero_stage: int) -> None:
    config = layout_config(layout, 4, zero_stage, model={"tie_embeddings": True})
    run, truth = run_sharded(ranks, config, layout, FEW), reference_of(config, FEW)
    assert "unembedding.weight" not in truth.gradients
    assert_within_bounds(config, errors_of(run, truth))


@pytest.mark.parametrize("layout", [(1, 2, 1, False), (2, 2, 1, True), (1, 2, 2, False)], ids=name_of)
def test_tied_embeddings_in_bf16(ranks: Ranks, layout: Any) -> None:
    config = layout_config(layout, 4, model={"tie_embeddings": True}, train={"precision": "bf16"})
    assert_equals_reference(ranks, config, layout, FEW)


def test_a_rank_whose_vocabulary_is_all_padding(ranks: Ranks) -> None:
    layout = (4, 1, 1, True)
    config = layout_config(layout, 2, model={"num_query_groups": 4})
    assert padded_vocab_size(VOCAB_SIZE, 4) * 3 // 4 >= VOCAB_SIZE
    assert_equals_reference(ranks, config, layout, FEW)


@pytest.mark.parametrize("layout", [(1, 1, 1, False), (2, 2, 1, True)], ids=name_of)
def test_a_gradient_that_is_not_finite_changes_no_weight(ranks: Ranks, layout: Any) -> None:
    config = layout_config(layout, 4)
    tensor, pipeline, data, _ = layout
    before, after, norm = ranks.run(tensor * pipeline * data, run_with_broken_gradient, config)[0]
    assert norm == float("inf") or norm != norm
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", [(1, 1, 2, False), (2, 2, 1, True), (1, 4, 1, False)], ids=name_of)
def test_evaluation_between_training_steps(ranks: Ranks, layout: Any) -> None:
    config = layout_config(layout, 4, heads={"distillation": 0.5, "token_order": 0.5})
    tensor, pipeline, data, _ = layout
    truth = reference_of(config, FEW).losses[0]
    assert (truth[1, 1:] > 1).all() and truth[2, 0] > 1, "every kind of loss is compared"
    for answers in ranks.run(tensor * pipeline * data, losses_of_evaluations, config):
        before, first_step, after, twice, second_step = answers
        assert largest_error(before, truth) <= 1e-5
        assert torch.equal(before, first_step)
        assert largest_error(twice, after) <= 1e-12
        assert torch.equal(after, second_step) and bool((after < before)[truth > 0].all())


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "two layers a head": {"heads": {"count": 2, "layers_per_head": 2}},
    "unequal loss weights": {"heads": {"count": 3, "loss_weights": [1.0, 0.3, 0.0]}},
    "no grouped queries": {"model": {"num_query_groups": 4}},
    "linear rope scaling": {"model": {"rope_scaling": LINEAR_ROPE, "init_std": 0.2}},
    "llama3 rope scaling": {"model": {"rope_scaling": LLAMA3_ROPE, "init_std": 0.2}},
    "explicit partition": {"parallel": {"partition": [3, 1]}},
    "uniform partition": {"parallel": {"partition": "uniform"}},
    "heads alone on the last stage": {"parallel": {"partition": [4, 0]}},
    "no clipping": {"train": {"grad_clip": 0.0}},
    "tight clipping": {"train": {"grad_clip": 0.05}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(ranks: Ranks, variant: str) -> None:
    layout = (2, 2, 1, True)
    config = layout_config(layout, 2, **{name: dict(section) for name, section in VARIANTS[variant].items()})
    assert_equals_reference(ranks, config, layout, FEW)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [(1, 1, 1, False), (2, 2, 1, True), (1, 2, 2, False)], ids=name_of)
def test_runs_repeat_bit_for_bit(ranks: Ranks, layout: Any, precision: str) -> None:
    config = layout_config(layout, 4, train={"precision": precision})
    first, second = (run_sharded(ranks, config, layout, FEW) for _ in range(2))
    assert torch.equal(first.losses, second.losses) and torch.equal(first.norms, second.norms)
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name]), name
