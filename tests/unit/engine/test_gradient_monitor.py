"""The norms of the model's parts, and who is named where a gradient or a loss is not finite."""

import math

import pytest

from mtp_dist.engine.gradients import module_group
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.engine.monitor_on_ranks import Watched, break_a_sum, watch

NOT_FINITE = "the gradient is not finite, "
HEAD_WEIGHT = "heads.2.0.mlp.linear_fc1.weight"


def with_progress(
    ranks: Ranks,
    layout: tuple[int, int, int],
    precision: str = "fp32",
    zero_stage: int = 0,
    weight: str | None = None,
    head: int | None = None,
    rank: int | None = None,
) -> Watched:
    """With the last rank bad where none is named."""
    tensor, pipeline, data = layout
    config = tiny_config(
        parallel={"tensor": tensor, "pipeline": pipeline, "zero_stage": zero_stage}, train={"precision": precision}
    )
    world = tensor * pipeline * data
    of_ranks = ranks.run(world, watch, config, world - 1 if rank is None else rank, weight, head)
    first = of_ranks[0]
    for other in of_ranks:
        assert other[:2] == first[:2] and other.skipped == first.skipped and other.unchanged
        assert 0 < other.seconds[0] <= other.seconds[1]
    assert not math.isfinite(first.bad_norm)
    return first


@pytest.mark.parametrize(
    ("layout", "precision", "zero_stage"),
    [
        ((1, 2, 2), "fp32", 0),
        ((2, 1, 2), "fp32", 1),
        ((1, 2, 2), "bf16", 1),
        ((2, 2, 1), "fp32", 0),
    ],
)
def test_norms_of_parts_make_the_whole_and_one_rank_is_named(
    ranks: Ranks, layout: tuple[int, int, int], precision: str, zero_stage: int
) -> None:
    one = with_progress(ranks, (1, 1, 1), precision, weight="trunk.0.mlp.linear_fc1.weight")
    assert one.skipped == NOT_FINITE + "first on rank 0 (stage 0): the gradient of trunk.0.mlp.linear_fc1.weight"
    several = with_progress(ranks, layout, precision, zero_stage, weight=HEAD_WEIGHT)
    stage = layout[1] - 1
    assert several.skipped == NOT_FINITE + f"first on rank 3 (stage {stage}): the gradient of {HEAD_WEIGHT}"
    assert set(several.grad_norms_by_module) == {"trunk", "shared", "head_1", "head_2", "head_3", "head_4"}
    assert math.hypot(*several.grad_norms_by_module.values()) == pytest.approx(several.grad_norm, rel=1e-6)
    assert several.grad_norms_by_module == pytest.approx(
        one.grad_norms_by_module, rel=1e-2 if precision == "bf16" else 1e-5
    )


def test_a_rank_of_an_earlier_stage_is_named_where_the_last_one_is_well(ranks: Ranks) -> None:
    found = with_progress(ranks, (1, 2, 2), weight="trunk.0.mlp.linear_fc2.weight", rank=1).skipped
    assert found == NOT_FINITE + "first on rank 1 (stage 0): the gradient of trunk.0.mlp.linear_fc2.weight"


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 0), ("fp32", 1), ("bf16", 1)])
def test_a_loss_that_is_not_finite_drops_the_step_too(ranks: Ranks, precision: str, zero_stage: int) -> None:
    found = with_progress(ranks, (1, 2, 2), precision, zero_stage, head=3).skipped
    assert found == NOT_FINITE + "first on rank 3 (stage 1): the loss of head 3"


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        pytest.param((1, 1, 2), "fp32"),
        ((1, 2, 2), "fp32"),
        ((2, 1, 2), "bf16"),
    ],
)
def test_all_ranks_drop_a_step_that_one_must_drop(ranks: Ranks, layout: tuple[int, int, int], precision: str) -> None:
    """A device that computes wrongly, after the data-parallel ranks have summed their gradients."""
    tensor, pipeline, data = layout
    config = tiny_config(parallel={"tensor": tensor, "pipeline": pipeline}, train={"precision": precision})
    world = tensor * pipeline * data
    for dropped in ranks.run(world, break_a_sum, config, world - 1):
        assert not math.isfinite(dropped.norm) and dropped.unchanged
        assert dropped.skipped == NOT_FINITE + "that of every rank is finite, their sum is not"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("trunk.0.mlp.linear_fc1.weight", "trunk"),
        ("heads.12.0.mlp.linear_fc1.weight", "head_12"),
        ("unembeddings.2.weight", "head_2"),
        ("heads.repeated.eh_proj.weight", "repeated_head"),
        ("embedding.weight", "shared"),
        ("final_norm.weight", "shared"),
        ("token_order.weight", "shared"),
    ],
)
def test_parts_of_the_model(name: str, part: str) -> None:
    assert module_group(name) == part
