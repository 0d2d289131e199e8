"""An interrupted training equals the uninterrupted one, at the same layout and at others."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.errors import largest_error, norm_error
from tests.parity import resuming
from tests.parity.comparison import Layout
from tests.parity.resuming import ALL, BOTH, DATA, DUALPIPEV, END, LAYOUTS, MIDDLE, ONE, PIPELINE, TENSOR, at, run
from tests.ranks import Ranks
from tests.tiny import BLOCKS

SAME: dict[str, tuple[Layout, dict[str, Any]]] = {
    "one process": (ONE, {}),
    "all axes": (BOTH, {}),
    "ZeRO": (ALL, {"zero_stage": 1}),
    "bf16": (DATA, {"train": {"precision": "bf16"}}),
    "bf16, all axes, tied": (BOTH, {"train": {"precision": "bf16"}, "model": {"tie_embeddings": True}}),
    "DualPipeV, bf16, tied": (DUALPIPEV, {"train": {"precision": "bf16"}, "model": {"tie_embeddings": True}}),
    "heads on two stages, bf16, tied": (
        PIPELINE,
        {"train": {"precision": "bf16"}, "model": {"tie_embeddings": True}, "heads": {"stages": 2}},
    ),
    "frozen trunk": (BOTH, {"train": {"precision": "bf16", "freeze": ["trunk"]}}),
    "shared embedding": (PIPELINE, {"heads": {"kind": "sequential"}}),
    "learning rates by part": (
        DATA,
        {
            "train": {"precision": "bf16"},
            "optimizer": {"multipliers": {"trunk": [[1, 0], [MIDDLE + 2, 0.1]], "embedding": 0.5}},
        },
    ),
    "weighted hidden states": (BOTH, {"heads": {"weighted_hidden_states": True}, "train": {"precision": "bf16"}}),
    "curriculum": (PIPELINE, {"heads": {"schedule": "forward", "count": 3}, "train": {"steps": END}}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_layout_is_bitwise_identical(ranks: Ranks, tmp_path: Path, name: str) -> None:
    layout, sections = SAME[name]
    resuming.assert_resume_is_bitwise(partial(run, ranks, at(layout, tmp_path, **sections), layout), tmp_path)


OTHERS: dict[Layout, dict[str, Any]] = {
    TENSOR: {"model": BLOCKS["qwen2"]},
    DUALPIPEV: {"model": BLOCKS["neox"]},
    BOTH: {"heads": {"condition": "previous_token", "condition_rank": 6}},
    ALL: {"model": BLOCKS["qwen3"]},
}
"""Sections of the trainings that begin at these layouts."""


@pytest.mark.parametrize(("before", "after"), list(zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)), ids=str)
def test_other_layout(ranks: Ranks, tmp_path: Path, before: Layout, after: Layout) -> None:
    zero_stage = LAYOUTS.index(before) % 2
    sections = OTHERS.get(before, {})
    whole = resuming.save_in_the_middle(ranks, before, tmp_path, zero_stage, **sections)
    errors = resuming.resume_errors(ranks, after, tmp_path, 1 - zero_stage, whole, **sections)
    assert errors["losses"] <= 1e-5 and errors["weights"] <= 1e-4


@pytest.mark.parametrize(("before", "after"), [((PIPELINE, 2), (ONE, 1)), ((DATA, 1), (PIPELINE, 2))], ids=str)
def test_heads_on_two_stages_and_on_one(
    ranks: Ranks, tmp_path: Path, before: tuple[Layout, int], after: tuple[Layout, int]
) -> None:
    """Pairs of a layout and a number of stages with heads."""
    (layout, stages), (other_layout, other_stages) = before, after
    whole = resuming.save_in_the_middle(ranks, layout, tmp_path, 1, heads={"stages": stages})
    errors = resuming.resume_errors(ranks, other_layout, tmp_path, 0, whole, heads={"stages": other_stages})
    assert errors["losses"] <= 1e-5 and errors["weights"] <= 1e-4


def test_frozen_trunk_resumes_at_other_layouts_and_thaws(ranks: Ranks, tmp_path: Path) -> None:
    frozen = {"train": {"freeze": ["trunk"]}}
    run(ranks, at(BOTH, tmp_path, **frozen), BOTH, 0, MIDDLE)
    whole = run(ranks, at(BOTH, tmp_path, **frozen), BOTH, 0, END, None, False)
    folder = tmp_path / f"step_{MIDDLE:08d}"
    saved = json.loads((folder / "optimizer.safetensors.index.json").read_text())["weight_map"]
    assert saved.keys() == whole.moments.keys() == {name for name in saved if ".heads." in name and ".1." not in name}
    for layout, zero_stage in ((ONE, 0), (ALL, 1)):
        rest = run(ranks, at(layout, tmp_path, zero_stage, **frozen), layout, MIDDLE, END, folder, False)
        assert rest.moments.keys() == whole.moments.keys()
        assert max(norm_error(weight, whole.weights[name]) for name, weight in rest.weights.items()) <= 1e-4
        assert largest_error(torch.stack(rest.losses), torch.stack(whole.losses[MIDDLE:])) <= 1e-5
    thawed = run(ranks, at(PIPELINE, tmp_path), PIPELINE, MIDDLE, MIDDLE, folder, False)
    assert thawed.moments.keys() > saved.keys()
    for name, moment in thawed.moments.items():
        assert bool(moment.any()) == (name in saved), name


def test_heads_are_added_to_a_trained_trunk(ranks: Ranks, tmp_path: Path) -> None:
    trained = run(ranks, at(ONE, tmp_path, heads={"count": 1}), ONE, 0, MIDDLE)
    config = at(PIPELINE, tmp_path, heads={"count": 3, "condition": "previous_token"})
    wider = run(ranks, config, PIPELINE, MIDDLE, MIDDLE, tmp_path / f"step_{MIDDLE:08d}", False)
    fresh = run(ranks, config, PIPELINE, 0, 0, None, False)
    for name, weight in wider.weights.items():
        expected = trained.weights if name in trained.weights else fresh.weights
        assert torch.equal(weight, expected[name]), name
    new = {name for name in fresh.weights if name.startswith(("heads.2", "heads.3", "condition."))}
    assert wider.weights.keys() - trained.weights.keys() == new
