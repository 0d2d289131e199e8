"""Every way to the heads' loss equals the plain reference. Most of `eager`, the default, is in test_layouts.py."""

from typing import Any

import pytest
import torch

from tests.parity.comparison import Layout, assert_equals_reference, layout_config, name_of, run_sharded
from tests.ranks import Ranks

FEW = 2
"""Steps: the first compares gradients, the second what the update made of them."""
ONE, PIPELINE, DATA, TENSOR = (1, 1, 1, False), (2, 2, 1, True), (1, 2, 2, False), (4, 1, 1, False)


def config_of(layout: Layout, accumulation: int, zero_stage: int, **sections: Any) -> Any:
    groups = {"num_query_groups": 4 if layout[0] == 4 else 2}
    sections["model"] = groups | sections.get("model", {})
    return layout_config(layout, accumulation, zero_stage, **sections)


@pytest.mark.parametrize("mode", ["recompute", "naive"])
@pytest.mark.parametrize(
    ("layout", "accumulation", "zero_stage"),
    [(ONE, 4, 0), (PIPELINE, 4, 1), (DATA, 1, 0), (TENSOR, 1, 1)],
    ids=lambda value: name_of(value) if isinstance(value, tuple) else str(value),
)
def test_mode(ranks: Ranks, layout: Layout, accumulation: int, zero_stage: int, mode: str) -> None:
    config = config_of(layout, accumulation, zero_stage, heads={"loss_mode": mode})
    assert_equals_reference(ranks, config, layout, FEW)


@pytest.mark.parametrize("mode", ["recompute", "naive"])
@pytest.mark.parametrize("layout", [PIPELINE, DATA], ids=name_of)
def test_mode_in_bf16(ranks: Ranks, layout: Layout, mode: str) -> None:
    config = config_of(layout, 4, 0, heads={"loss_mode": mode}, train={"precision": "bf16"})
    assert_equals_reference(ranks, config, layout, FEW)


SEPARATE, Z_LOSS, BF16 = {"unembedding": "separate"}, {"z_loss": 1e-2}, {"precision": "bf16"}
SPECIAL: dict[str, tuple[Layout, int, int, dict[str, dict[str, Any]]]] = {
    # name: layout, accumulation, ZeRO stage, sections
    "eager, separate": (PIPELINE, 4, 1, {"heads": SEPARATE}),
    "eager, separate, bf16": (DATA, 4, 0, {"heads": SEPARATE | Z_LOSS, "train": BF16}),
    "eager, separate, z-loss, chunks": (TENSOR, 1, 0, {"heads": SEPARATE | Z_LOSS | {"chunk_tokens": 5}}),
    "eager, z-loss, all recomputed": (
        PIPELINE,
        1,
        0,
        {"heads": Z_LOSS | {"chunk_tokens": 5}, "train": {"activation_checkpointing": "full"}},
    ),
    "recompute, separate, z-loss": (
        PIPELINE,
        4,
        0,
        {"heads": SEPARATE | Z_LOSS | {"loss_mode": "recompute", "chunk_tokens": 5}},
    ),
    "recompute, tied, all recomputed": (
        PIPELINE,
        4,
        1,
        {
            "heads": {"loss_mode": "recompute"},
            "model": {"tie_embeddings": True},
            "train": {"activation_checkpointing": "full"},
        },
    ),
    "recompute, MLP recomputed": (
        TENSOR,
        4,
        0,
        {"heads": {"loss_mode": "recompute"} | Z_LOSS, "train": {"activation_checkpointing": "selective"}},
    ),
    "naive, separate, z-loss": (PIPELINE, 4, 1, {"heads": SEPARATE | Z_LOSS | {"loss_mode": "naive"}}),
    "naive, tied": (DATA, 4, 0, {"heads": {"loss_mode": "naive"}, "model": {"tie_embeddings": True}}),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_together_with(ranks: Ranks, name: str) -> None:
    layout, accumulation, zero_stage, sections = SPECIAL[name]
    config = config_of(layout, accumulation, zero_stage, **{key: dict(section) for key, section in sections.items()})
    assert_equals_reference(ranks, config, layout, FEW)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eager_equals_recompute_bit_for_bit(ranks: Ranks, precision: str) -> None:
    eager, recompute = (
        run_sharded(
            ranks,
            config_of(PIPELINE, 4, 0, heads={"loss_mode": mode}, train={"precision": precision}),
            PIPELINE,
            FEW,
        )
        for mode in ("eager", "recompute")
    )
    assert torch.equal(eager.losses, recompute.losses) and torch.equal(eager.norms, recompute.norms)
    for name, weight in eager.weights.items():
        assert torch.equal(weight, recompute.weights[name]), name
