"""Every kind of head equals the plain reference at every layout."""

from typing import Any

import pytest

from tests.parity.comparison import Layout, assert_equals_reference, layout_config, name_of
from tests.ranks import Ranks

FEW = 2
"""Steps: the first compares gradients, the second what the update made of them."""
LAYOUTS: list[Layout] = [(2, 1, 1, False), (1, 2, 1, False), (2, 2, 1, False), (2, 1, 1, True)]
KINDS: dict[str, dict[str, Any]] = {
    "parallel of 2 layers": {"layers_per_head": 2, "count": 3},
    "causal": {"kind": "causal"},
    "anticausal": {"kind": "anticausal"},
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp"},
    "sequential": {"kind": "sequential"},
    "repeated": {"kind": "sequential", "repeated": True},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_kind(ranks: Ranks, layout: Layout, name: str) -> None:
    config = layout_config(layout, 4, heads=dict(KINDS[name]))
    assert_equals_reference(ranks, config, layout, FEW)


SPECIAL: dict[str, tuple[Layout, dict[str, dict[str, Any]]]] = {
    "causal, detached": ((2, 2, 1, True), {"heads": {"kind": "causal", "detach": True}}),
    "parallel, detached": ((1, 2, 1, False), {"heads": {"detach": True}}),
    "mlp, detached, separate": (
        (2, 2, 1, False),
        {"heads": {"kind": "mlp", "detach": True, "unembedding": "separate"}},
    ),
    "sequential, detached": ((1, 2, 1, False), {"heads": {"kind": "sequential", "detach": True}}),
    "sequential, tied": ((2, 2, 1, False), {"heads": {"kind": "sequential"}, "model": {"tie_embeddings": True}}),
    "sequential, separate, recompute": (
        (2, 2, 1, True),
        {"heads": {"kind": "sequential", "unembedding": "separate", "loss_mode": "recompute"}},
    ),
    "sequential, naive": ((2, 2, 1, True), {"heads": {"kind": "sequential", "loss_mode": "naive"}}),
    "anticausal, recompute": ((2, 1, 1, True), {"heads": {"kind": "anticausal", "loss_mode": "recompute"}}),
    "anticausal, naive": ((2, 1, 1, False), {"heads": {"kind": "anticausal", "loss_mode": "naive"}}),
    "repeated, all recomputed": (
        (2, 2, 1, False),
        {"heads": {"kind": "sequential", "repeated": True}, "train": {"activation_checkpointing": "full"}},
    ),
    "leaps": ((2, 2, 1, False), {"heads": {"prediction_distances": [1, 3, 5, 7]}}),
    "causal leaps": ((1, 2, 1, False), {"heads": {"kind": "causal", "count": 3, "prediction_distances": [1, 2, 4]}}),
    "auxiliary weight in steps": ((1, 2, 1, False), {"heads": {"auxiliary_weight": [[1, 0.3], [2, 0.1]]}}),
    "loss decay": ((1, 1, 2, False), {"heads": {"loss_decay": 0.6}}),
    "distillation": ((2, 1, 1, False), {"heads": {"distillation": 0.5, "distillation_top": 5}}),
    "distillation of all, recompute": (
        (2, 2, 1, True),
        {"heads": {"kind": "sequential", "distillation": 0.5, "distillation_top": 500, "loss_mode": "recompute"}},
    ),
    "distillation of leaps in chunks": (
        (2, 2, 1, False),
        {
            "heads": {
                "distillation": 2.0,
                "distillation_top": 3,
                "prediction_distances": [1, 3, 5, 7],
                "chunk_tokens": 5,
                "z_loss": 1e-2,
                "unembedding": "separate",
            }
        },
    ),
    "distillation with weights": (
        (1, 2, 2, False),
        {"heads": {"distillation": 0.5, "distillation_top": 5, "loss_weights": [1, 0.3, 0.5, 0]}},
    ),
    "distillation and order, data-parallel": (
        (1, 1, 2, False),
        {"heads": {"kind": "sequential", "distillation": 0.5, "token_order": 0.7, "token_order_window": 8}},
    ),
    "sequential, data-parallel": ((1, 2, 2, False), {"heads": {"kind": "sequential"}, "parallel": {"zero_stage": 1}}),
    "token order": ((2, 2, 1, False), {"heads": {"token_order": 0.7, "token_order_window": 8}}),
    "token order in chunks": (
        (2, 1, 1, True),
        {"heads": {"token_order": 1.0, "token_order_window": 20, "chunk_tokens": 5, "loss_mode": "recompute"}},
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_together_with(ranks: Ranks, name: str) -> None:
    layout, sections = SPECIAL[name]
    config = layout_config(layout, 4, **{key: dict(section) for key, section in sections.items()})
    assert_equals_reference(ranks, config, layout, FEW)


SCHEDULES = ["forward", "reverse"]


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(ranks: Ranks, schedule: str, zero_stage: int, kind: str) -> None:
    layout: Layout = (1, 2, 1, False) if zero_stage else (2, 1, 1, True)
    heads = {"kind": kind, "schedule": schedule, "count": 3}
    config = layout_config(layout, 4, zero_stage, heads=heads, train={"steps": 6})
    assert_equals_reference(ranks, config, layout, 6)


@pytest.mark.parametrize("name", ["distillation", "token order", "sequential, tied", "causal, detached"])
def test_in_bf16(ranks: Ranks, name: str) -> None:
    layout, sections = SPECIAL[name]
    config = layout_config(layout, 4, **sections, train={"precision": "bf16"})
    assert_equals_reference(ranks, config, layout, FEW)
