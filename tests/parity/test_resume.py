"""An interrupted training equals the uninterrupted one, at the same layout and at others."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import resuming
from tests.parity.comparison import Layout
from tests.parity.resuming import ALL, BOTH, DATA, END, LAYOUTS, MIDDLE, ONE, PIPELINE, at, run
from tests.ranks import Ranks

SAME: dict[str, tuple[Layout, dict[str, Any]]] = {
    "one process": (ONE, {}),
    "all axes": (BOTH, {}),
    "ZeRO": (ALL, {"zero_stage": 1}),
    "bf16": (DATA, {"train": {"precision": "bf16"}}),
    "bf16, all axes, tied": (BOTH, {"train": {"precision": "bf16"}, "model": {"tie_embeddings": True}}),
    "shared embedding": (PIPELINE, {"heads": {"kind": "sequential"}}),
    "learning rates by part": (
        DATA,
        {"train": {"precision": "bf16"}, "optimizer": {"multipliers": {"trunk": 0.1, "embedding": 0.5}}},
    ),
    "curriculum": (PIPELINE, {"heads": {"schedule": "forward", "count": 3}, "train": {"steps": END}}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_layout_is_bitwise_identical(ranks: Ranks, tmp_path: Path, name: str) -> None:
    layout, sections = SAME[name]
    resuming.assert_resume_is_bitwise(partial(run, ranks, at(layout, tmp_path, **sections), layout), tmp_path)


@pytest.mark.parametrize(("before", "after"), list(zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)), ids=str)
def test_other_layout(ranks: Ranks, tmp_path: Path, before: Layout, after: Layout) -> None:
    zero_stage = LAYOUTS.index(before) % 2
    whole = resuming.save_in_the_middle(ranks, before, tmp_path, zero_stage)
    errors = resuming.resume_errors(ranks, after, tmp_path, 1 - zero_stage, whole)
    assert errors["losses"] <= 1e-5 and errors["weights"] <= 1e-4


def test_heads_are_added_to_a_trained_trunk(ranks: Ranks, tmp_path: Path) -> None:
    trained = run(ranks, at(ONE, tmp_path, heads={"count": 1}), ONE, 0, MIDDLE)
    config = at(PIPELINE, tmp_path, heads={"count": 3})
    wider = run(ranks, config, PIPELINE, MIDDLE, MIDDLE, tmp_path / f"step_{MIDDLE:08d}", False)
    fresh = run(ranks, config, PIPELINE, 0, 0, None, False)
    for name, weight in wider.weights.items():
        expected = trained.weights if name in trained.weights else fresh.weights
        assert torch.equal(weight, expected[name]), name
    new = {name for name in fresh.weights if name.startswith(("heads.2", "heads.3"))}
    assert wider.weights.keys() - trained.weights.keys() == new
