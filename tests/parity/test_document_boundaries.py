"""Where documents stop the attention and the targets, every layout equals the plain reference."""

from typing import Any

import pytest
import torch

from mtp_dist.model.targets import IGNORE_INDEX, document_ids
from mtp_dist.verify.reference_training import END_OF_DOCUMENT
from tests.engines import global_batch
from tests.parity.comparison import Layout, assert_equals_reference, layout_config, name_of
from tests.parity.documents_on_ranks import second_document_losses
from tests.ranks import Ranks

FEW = 2
APART = {"loss_across_documents": False, "attention_across_documents": False}
DATA, PIPELINE, MIDDLE, ALL = (1, 1, 2, False), (1, 2, 1, False), (1, 3, 1, False), (2, 2, 1, True)
LAYOUTS: list[Layout] = [(2, 1, 1, False), PIPELINE, ALL, MIDDLE, DATA]


def test_the_batches_have_documents_and_masks_that_differ() -> None:
    samples, targets = global_batch(layout_config(DATA, 4, data=APART), 1)
    documents = document_ids(samples, END_OF_DOCUMENT)[:, -1] + 1
    assert documents[0] >= 4 and documents[-1] == 1
    halves = [(half != IGNORE_INDEX).sum((1, 2)) for half in targets.chunk(2, 1)]
    assert (halves[0] != halves[1]).all(), "data-parallel ranks have unequal numbers of targets"
    assert len(set(halves[0].tolist())) == len(targets), "and so have the heads"


@pytest.mark.parametrize("kind", ["parallel", "causal", "sequential"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_kind(ranks: Ranks, layout: Layout, kind: str) -> None:
    config = layout_config(layout, 4, heads={"kind": kind}, data=APART)
    assert_equals_reference(ranks, config, layout, FEW)


SPECIAL: dict[str, tuple[Layout, dict[str, dict[str, Any]]]] = {
    "two stages between": ((1, 4, 1, False), {}),
    "loss alone": (MIDDLE, {"data": {"loss_across_documents": False}}),
    "attention alone": (MIDDLE, {"data": {"attention_across_documents": False}}),
    "all recomputed": (MIDDLE, {"train": {"activation_checkpointing": "full"}}),
    "all recomputed, twice": (
        ALL,
        {"train": {"activation_checkpointing": "full"}, "heads": {"kind": "causal", "loss_mode": "recompute"}},
    ),
    "MLP recomputed": (ALL, {"train": {"activation_checkpointing": "selective"}}),
    "naive": (PIPELINE, {"heads": {"kind": "sequential", "loss_mode": "naive"}}),
    "recompute, tied": (ALL, {"heads": {"loss_mode": "recompute"}, "model": {"tie_embeddings": True}}),
    "anticausal": (PIPELINE, {"heads": {"kind": "anticausal"}}),
    "mlp": (PIPELINE, {"heads": {"kind": "mlp"}}),
    "linear": (PIPELINE, {"heads": {"kind": "linear"}}),
    "repeated": (MIDDLE, {"heads": {"kind": "sequential", "repeated": True, "layers_per_head": 2}}),
    "leaps and distillation": (
        ALL,
        {"heads": {"prediction_distances": [1, 3, 5, 7], "distillation": 0.5, "distillation_top": 5}},
    ),
    "token order": (MIDDLE, {"heads": {"token_order": 0.7, "token_order_window": 8}}),
    "token order, recompute": (
        (2, 1, 1, True),
        {"heads": {"token_order": 0.7, "token_order_window": 20, "loss_mode": "recompute", "chunk_tokens": 5}},
    ),
    "both axes of data and pipeline": ((1, 2, 2, False), {"parallel": {"zero_stage": 1}}),
    "bf16": (ALL, {"train": {"precision": "bf16", "activation_checkpointing": "full"}}),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_together_with(ranks: Ranks, name: str) -> None:
    layout, sections = SPECIAL[name]
    sections = {"data": APART} | {key: dict(section) for key, section in sections.items()}
    config = layout_config(layout, 4, **sections)
    assert_equals_reference(ranks, config, layout, FEW)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
@pytest.mark.parametrize("layout", [MIDDLE, ALL], ids=name_of)
def test_a_document_does_not_know_the_one_before_it(ranks: Ranks, layout: Layout, kind: str) -> None:
    tensor, pipeline, _, _ = layout
    apart, together = (
        layout_config(layout, 4, heads={"kind": kind}, data={"attention_across_documents": across})
        for across in (False, True)
    )
    for before, after in ranks.run(tensor * pipeline, second_document_losses, apart):
        assert (before > 0).all() and torch.equal(before, after)
    for before, after in ranks.run(tensor * pipeline, second_document_losses, together):
        assert (before != after).all()
