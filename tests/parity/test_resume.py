"""A training that was interrupted equals the one that was not, at the same layout and at others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist.config import Config
from tests.errors import largest_error, norm_error
from tests.parity.comparison import Layout, layout_config, name_of
from tests.ranks import Ranks
from tests.unit.checkpoint.on_ranks import Part, train_part

MIDDLE, END = 3, 6
ONE, TENSOR, PIPELINE = (1, 1, 1, False), (2, 1, 1, True), (1, 2, 1, False)
BOTH, DATA, ALL = (2, 2, 1, False), (1, 1, 2, False), (2, 1, 2, False)
LAYOUTS: list[Layout] = [ONE, TENSOR, PIPELINE, BOTH, DATA, ALL]


def run(ranks: Ranks, config: Config, layout: Layout, *arguments: Any) -> Part:
    """What all stages have together."""
    tensor, pipeline, data, _ = layout
    parts = ranks.run(tensor * pipeline * data, train_part, config, *arguments)
    weights = {name: weight for part in parts for name, weight in part.weights.items()}
    return Part(parts[0].losses, weights, {name: moment for part in parts for name, moment in part.moments.items()})


def at(layout: Layout, directory: Path, **sections: Any) -> Config:
    zero_stage = sections.pop("zero_stage", 0)
    return layout_config(layout, 2, zero_stage, checkpoint={"directory": str(directory)}, **sections)


SAME: dict[str, tuple[Layout, dict[str, Any]]] = {
    "one process": (ONE, {}),
    "all axes": (BOTH, {}),
    "ZeRO": (ALL, {"zero_stage": 1}),
    "bf16": (DATA, {"train": {"precision": "bf16"}}),
    "bf16, all axes, tied": (BOTH, {"train": {"precision": "bf16"}, "model": {"tie_embeddings": True}}),
    "shared embedding": (PIPELINE, {"heads": {"kind": "sequential"}}),
    "curriculum": (PIPELINE, {"heads": {"schedule": "forward", "count": 3}, "train": {"steps": END}}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_layout_is_the_same_to_the_last_bit(ranks: Ranks, tmp_path: Path, name: str) -> None:
    layout, sections = SAME[name]
    config = at(layout, tmp_path, **sections)
    whole = run(ranks, config, layout, 0, END, None, False)
    run(ranks, config, layout, 0, MIDDLE)
    rest = run(ranks, config, layout, MIDDLE, END, tmp_path / f"step_{MIDDLE:08d}")
    assert torch.equal(torch.stack(rest.losses), torch.stack(whole.losses[MIDDLE:]))
    for after, expected in ((rest.weights, whole.weights), (rest.moments, whole.moments)):
        assert after.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in after.items())


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize(
    ("before", "after"), list(zip(LAYOUTS, LAYOUTS[1:] + LAYOUTS[:1], strict=True)), ids=lambda layout: name_of(layout)
)
def test_other_layout(ranks: Ranks, tmp_path: Path, before: Layout, after: Layout, zero_stage: int) -> None:
    whole = run(ranks, at(before, tmp_path, zero_stage=zero_stage), before, 0, END, None, False)
    run(ranks, at(before, tmp_path, zero_stage=zero_stage), before, 0, MIDDLE)
    config = at(after, tmp_path, zero_stage=1 - zero_stage)
    rest = run(ranks, config, after, MIDDLE, END, tmp_path / f"step_{MIDDLE:08d}")
    # Without the last row, which these heads do not have.
    losses, expected = (torch.stack(part.losses[-END + MIDDLE :])[:, 0] for part in (rest, whole))
    assert largest_error(losses, expected) <= 1e-5
    assert max(norm_error(weight, whole.weights[name]) for name, weight in rest.weights.items()) <= 1e-4


def test_heads_are_added_to_a_trained_trunk(ranks: Ranks, tmp_path: Path) -> None:
    run(ranks, at(ONE, tmp_path, heads={"count": 1}), ONE, 0, MIDDLE)
    trained = run(ranks, at(ONE, tmp_path / "unused", heads={"count": 1}), ONE, 0, MIDDLE, None, False)
    config = at(PIPELINE, tmp_path, heads={"count": 3})
    folder = tmp_path / f"step_{MIDDLE:08d}"
    wider = run(ranks, config, PIPELINE, MIDDLE, MIDDLE, folder, False)
    fresh = run(ranks, config, PIPELINE, 0, 0, None, False)
    for name, weight in wider.weights.items():
        expected = trained.weights if name in trained.weights else fresh.weights
        assert torch.equal(weight, expected[name]), name
    assert wider.weights.keys() - trained.weights.keys() == {
        n for n in fresh.weights if n.startswith(("heads.2", "heads.3"))
    }
