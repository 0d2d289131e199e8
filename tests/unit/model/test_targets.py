"""Targets of the heads, and what the ends of documents do to them and to attention."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from torch import Tensor

from mtp_dist.model.reference import ReferenceModel
from mtp_dist.model.targets import IGNORE_INDEX, attention_bias, document_ids, head_targets
from tests.tiny import tiny_config

END = 0
LENGTH = 12
DISTANCES = st.sets(st.integers(1, 9)).map(lambda others: sorted({1, *others}))


@st.composite
def batches(draw: st.DrawFn, lookahead: int) -> Tensor:
    """Samples `[B, S + lookahead]` in which about every other token, or none, ends a document."""
    sample = st.lists(st.sampled_from([END, END, 1, 2, 3]), min_size=LENGTH + lookahead, max_size=LENGTH + lookahead)
    return torch.tensor(draw(st.lists(sample, min_size=1, max_size=3)))


def test_by_hand() -> None:
    samples = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    one, two = [[11, 12, 13], [21, 22, 23]], [[12, 13, 14], [22, 23, 24]]
    assert head_targets(samples, [1, 2], 3).tolist() == [one, two]
    leap = torch.arange(10, 20)[None]
    assert head_targets(leap, [1, 3], 4).tolist() == [[[11, 12, 13, 14]], [[13, 14, 15, 16]]]
    samples, none = torch.tensor([[5, 6, END, 7, 8, 9]]), IGNORE_INDEX
    targets = head_targets(samples, [1, 2], 4, document_ids(samples, END))
    assert targets.tolist() == [[[6, END, none, 8]], [[END, none, none, 9]]]


def test_document_ids_by_hand() -> None:
    tokens = torch.tensor([[5, 6, END, 7, END, END, 8], [1, 2, 3, 4, 5, 6, END]])
    assert document_ids(tokens, END).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]


@given(data=st.data(), distances=DISTANCES)
def test_a_target_counts_unless_a_document_ends_before_it(data: st.DataObject, distances: list[int]) -> None:
    samples = data.draw(batches(lookahead=distances[-1]))
    everywhere = head_targets(samples, distances, LENGTH)
    targets = head_targets(samples, distances, LENGTH, document_ids(samples, END))
    for k, distance in enumerate(distances):
        assert torch.equal(everywhere[k], samples[:, distance : distance + LENGTH])
        assert targets[k].tolist() == [
            [IGNORE_INDEX if END in row[t : t + distance] else row[t + distance] for t in range(LENGTH)]
            for row in samples.tolist()
        ]


@given(data=st.data(), distances=DISTANCES)
def test_targets_imply_teacher(data: st.DataObject, distances: list[int]) -> None:
    """Distillation takes a head's soft targets from a position where head 1 has the same target."""
    samples = data.draw(batches(lookahead=distances[-1]))
    targets = head_targets(samples, distances, LENGTH, document_ids(samples, END))
    for head, distance in zip(targets, distances, strict=True):
        with_teacher = head[:, : max(0, LENGTH - (distance - 1))]
        counts = with_teacher != IGNORE_INDEX
        assert torch.equal(targets[0][:, distance - 1 :][counts], with_teacher[counts])


@given(tokens=batches(lookahead=1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_head_1_and_attention_are_megatrons(tokens: Tensor, dtype: torch.dtype) -> None:
    """Megatron's `reset_attention_mask` and `eod_mask_loss`, both off by default like ours."""
    documents = document_ids(tokens, END)
    bias = attention_bias(documents[:, :LENGTH], dtype)
    assert bias.shape == (len(tokens), 1, LENGTH, LENGTH) and bias.dtype == dtype
    counts = head_targets(tokens, [1], LENGTH, documents)[0] != IGNORE_INDEX
    for row, row_bias, row_counts in zip(tokens[:, :LENGTH], bias[:, 0], counts, strict=True):
        masked, loss_mask, _ = _get_ltor_masks_and_position_ids(row, END, False, True, True, True)
        assert torch.equal(row_bias, torch.zeros_like(row_bias).masked_fill(masked[0], -float("inf")))
        assert torch.equal(row_counts, loss_mask.bool())


@pytest.mark.parametrize(
    "heads", [{"layers_per_head": 2}, *({"kind": k} for k in ("causal", "anticausal", "sequential"))]
)
def test_a_document_of_the_reference_is_alone(heads: dict[str, Any]) -> None:
    """Its logits are those of a sample of its own: wherever positions start to count, only rounding differs."""
    model = ReferenceModel(tiny_config(heads=heads, model={"init_std": 0.3})).double()
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(1, 37, (1, length), generator=generator) for length in (5, 11))
    first[0, -1] = END
    samples = torch.cat([first, second], 1)
    alone = model(second, 7)
    for head, logits in model(samples, 12, document_ids(samples, END)).items():
        torch.testing.assert_close(logits[:, 5:], alone[head], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(samples, 12)[1][:, 5:], alone[1], atol=1e-2), "and they differ in a stream"
