"""Gradient norms per module, and the origin of a gradient or a loss that is not finite, which all ranks drop."""

import math
from collections.abc import Callable

import pytest
import torch
from deepspeed.runtime.pipe import schedule
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.engine.engine import StepResult
from mtp_dist.engine.gradients import module_group
from mtp_dist.engine.hooks import hook_instruction
from mtp_dist.engine.tensor_shards import master_weight
from mtp_dist.model.parameters import named_weights
from tests.engines import open_engine, take_step
from tests.parity.comparison import parse_case
from tests.ranks import Ranks

HEAD_WEIGHT, TRUNK_WEIGHT = "heads.2.0.mlp.linear_fc1.weight", "trunk.0.mlp.linear_fc2.weight"


def step_with_fault(config: Config, rank: int, fault: str) -> tuple[StepResult, StepResult, bool]:
    """On each rank: return a good step, a step with a fault on one rank, and whether that changed no weight.

    fault: the name of a weight whose gradient is NaN, `head K` for an infinite loss, `states` for a NaN in the gradient
    of the hidden states that the heads read, or `sum` for one after the reduction of the gradients.
    """
    engine = open_engine(config)
    good = take_step(engine, rate=1e-3)
    weights = dict(named_weights(engine.stage))
    before = {name: (master_weight(weight).clone(), weight.clone()) for name, weight in weights.items()}
    is_faulty = engine.topology.rank == rank

    def break_sum(execute: Callable[[], None]) -> None:
        weight = next(iter(weights.values()))
        gradient = weight.grad if config.train.precision == "fp32" else weight._hp_grad  # type: ignore[attr-defined]
        assert gradient is not None
        gradient.view(-1)[-1] = float("nan")
        execute()

    def break_gradient(_: object, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].register_hook(lambda gradient: gradient * float("nan"))

    if is_faulty and fault == "sum":
        hook_instruction(engine.pipeline, schedule.OptimizerStep, break_sum)
    elif is_faulty and fault.startswith("head "):
        heads = engine.stage.heads
        forward = heads.forward

        def forward_with_infinite_loss(*args: object) -> Tensor:
            loss = forward(*args)
            heads.sums.cross_entropy[int(fault[-1]) - 1] = float("inf")
            return loss

        heads.forward = forward_with_infinite_loss  # type: ignore[method-assign]
    elif is_faulty and fault == "states":
        engine.stage.heads.register_forward_pre_hook(break_gradient)
    elif is_faulty:
        weights[fault].register_hook(lambda gradient: gradient * float("nan"))
    bad = take_step(engine, rate=1e-3)
    after = {name: (master_weight(weight), weight) for name, weight in weights.items()}
    unchanged = all(torch.equal(*pair) for name in weights for pair in zip(before[name], after[name], strict=True))
    return good, bad, unchanged


def good_and_skipped(ranks: Ranks, case: str, fault: str, rank: int | None = None) -> tuple[StepResult, str]:
    """Return a good step, and why the step with a fault on a rank, the last one by default, was skipped everywhere."""
    layout, config = parse_case(f"{case} train.micro_batch_size=2")
    world_size = layout.world_size
    results = ranks.run(world_size, step_with_fault, config, world_size - 1 if rank is None else rank, fault)
    good, bad, _ = results[0]
    assert not math.isfinite(bad.grad_norm)
    for other_good, other_bad, unchanged in results:
        assert other_good[:-2] == good[:-2] and other_bad.skipped == bad.skipped and unchanged
        for result in (other_good, other_bad):
            assert 0 < result.busy_seconds <= result.schedule_seconds
    return good, bad.skipped.removeprefix("the gradient is not finite, ")


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        ("tp1-pp2-dp2", 1),
        ("tp2-pp1-dp2 parallel.zero_stage=1", 0),
        ("tp1-pp2-dp2 train.precision=bf16", 1),
        ("tp2-pp2-dp1-sp", 1),
    ],
)
def test_norms_of_modules_make_the_global_one_and_the_rank_is_named(ranks: Ranks, case: str, stage: int) -> None:
    precision = "train.precision=bf16" if "bf16" in case else ""
    one, skipped = good_and_skipped(ranks, f"tp1-pp1-dp1 {precision}", TRUNK_WEIGHT)
    assert skipped == f"first on rank 0 (stage 0): the gradient of {TRUNK_WEIGHT}"
    several, skipped = good_and_skipped(ranks, case, HEAD_WEIGHT)
    assert skipped == f"first on rank 3 (stage {stage}): the gradient of {HEAD_WEIGHT}"
    norms = several.grad_norms_by_module
    assert set(norms) == {"trunk", "shared", "head_1", "head_2", "head_3", "head_4"}
    assert math.hypot(*norms.values()) == pytest.approx(several.grad_norm, rel=1e-6)
    assert norms == pytest.approx(one.grad_norms_by_module, rel=1e-2 if precision else 1e-5)


FROZEN = [f"train.freeze=[trunk] {section}" for section in ("", "parallel.zero_stage=1", "train.precision=bf16")]
"""The stage before the heads has no gradient of its own."""


@pytest.mark.parametrize(
    ("case", "fault", "rank", "origin"),
    [
        ("tp1-pp2-dp2", TRUNK_WEIGHT, 1, f"first on rank 1 (stage 0): the gradient of {TRUNK_WEIGHT}"),
        # The gradients of all layers before the heads are NaN, on both ranks and in both stages of each.
        (
            "tp1-pp2-dp1-v train.precision=bf16 parallel.partition=uniform",
            "states",
            0,
            "first on rank 0 (stage 3): the gradient of trunk.3.mlp.linear_fc2.weight",
        ),
        (
            "tp1-pp2-dp1-v parallel.partition=uniform",
            TRUNK_WEIGHT,
            0,
            f"first on rank 0 (stage 0): the gradient of {TRUNK_WEIGHT}",
        ),
        ("tp1-pp2-dp1-v", "head 3", 0, "first on rank 0 (stage 3): the loss of head 3"),
        ("tp1-pp2-dp1 heads.stages=2", "head 1", 0, "first on rank 0 (stage 0): the loss of head 1"),
        *(
            (f"tp1-pp2-dp2 {section}", "head 3", None, "first on rank 3 (stage 1): the loss of head 3")
            for section in ("", "parallel.zero_stage=1", "train.precision=bf16", *FROZEN)
        ),
        *(
            (case, "sum", None, "although it is on every rank: the sum over ranks overflowed")
            for case in ("tp1-pp1-dp2", "tp1-pp2-dp2", "tp2-pp1-dp2 train.precision=bf16")
        ),
    ],
)
def test_all_ranks_skip_the_step_and_name_the_origin(
    ranks: Ranks, case: str, fault: str, rank: int | None, origin: str
) -> None:
    """Faults are a gradient on an earlier stage, a loss, and a device that sums wrongly."""
    assert good_and_skipped(ranks, case, fault, rank)[1] == origin


def test_module_of_a_weight() -> None:
    modules = {
        "trunk.0.mlp.linear_fc1.weight": "trunk",
        "heads.12.0.mlp.linear_fc1.weight": "head_12",
        "unembeddings.2.weight": "head_2",
        "heads.repeated.eh_proj.weight": "repeated_head",
        "embedding.weight": "shared",
        "final_norm.weight": "shared",
        "token_order.weight": "shared",
    }
    assert {name: module_group(name) for name in modules} == modules
