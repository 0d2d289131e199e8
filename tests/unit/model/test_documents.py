"""Where documents end: which targets that leaves, and which positions see which."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from torch import Tensor

from mtp_dist.model.reference import ReferenceModel
from mtp_dist.model.targets import IGNORE_INDEX, document_attention_bias, document_ids, head_targets
from tests.tiny import tiny_config

END = 0
LENGTH = 12
DISTANCES = st.sets(st.integers(1, 9)).map(lambda further: sorted({1, *further}))


@st.composite
def batches(draw: st.DrawFn, lookahead: int) -> Tensor:
    """Samples `[B, S + lookahead]` in which about every other token, or none, ends a document."""
    sample = st.lists(st.sampled_from([END, END, 1, 2, 3]), min_size=LENGTH + lookahead, max_size=LENGTH + lookahead)
    return torch.tensor(draw(st.lists(sample, min_size=1, max_size=3)))


def test_ids_by_hand() -> None:
    tokens = torch.tensor([[5, 6, END, 7, END, END, 8], [1, 2, 3, 4, 5, 6, END]])
    assert document_ids(tokens, END).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0] * 7]


@given(tokens=batches(lookahead=0))
def test_a_document_ends_with_its_end_of_document_token(tokens: Tensor) -> None:
    for row, ids in zip(tokens.tolist(), document_ids(tokens, END).tolist(), strict=True):
        document, expected = 0, []
        for token in row:
            expected.append(document)
            if token == END:
                document += 1
        assert ids == expected


def test_targets_by_hand() -> None:
    samples = torch.tensor([[5, 6, END, 7, 8, 9]])
    targets = head_targets(samples, [1, 2], 4, document_ids(samples, END))
    none = IGNORE_INDEX
    assert targets.tolist() == [[[6, END, none, 8]], [[END, none, none, 9]]]


@given(data=st.data(), distances=DISTANCES)
def test_a_target_counts_unless_a_document_ends_before_it(data: st.DataObject, distances: list[int]) -> None:
    samples = data.draw(batches(lookahead=distances[-1]))
    targets = head_targets(samples, distances, LENGTH, document_ids(samples, END))
    for of_head, distance in zip(targets.tolist(), distances, strict=True):
        for row, found in zip(samples.tolist(), of_head, strict=True):
            for t in range(LENGTH):
                ended = any(row[between] == END for between in range(t, t + distance))
                assert found[t] == (IGNORE_INDEX if ended else row[t + distance])


@given(data=st.data(), distances=DISTANCES)
def test_whoever_has_a_target_has_a_teacher(data: st.DataObject, distances: list[int]) -> None:
    """What head 1 says of a head's target comes from a position where head 1 has that target itself."""
    samples = data.draw(batches(lookahead=distances[-1]))
    targets = head_targets(samples, distances, LENGTH, document_ids(samples, END))
    for of_head, distance in zip(targets, distances, strict=True):
        with_teacher = of_head[:, : max(0, LENGTH - (distance - 1))]
        counts = with_teacher != IGNORE_INDEX
        assert torch.equal(targets[0][:, distance - 1 :][counts], with_teacher[counts])


@given(tokens=batches(lookahead=0), precision=st.sampled_from([torch.float32, torch.bfloat16]))
def test_positions_see_their_own_document_up_to_themselves(tokens: Tensor, precision: torch.dtype) -> None:
    documents = document_ids(tokens, END)
    bias = document_attention_bias(documents, precision)
    assert bias.shape == (len(tokens), 1, LENGTH, LENGTH) and bias.dtype == precision
    for ids, row in zip(documents.tolist(), bias[:, 0].tolist(), strict=True):
        for t in range(LENGTH):
            assert row[t] == [0.0 if s <= t and ids[s] == ids[t] else -float("inf") for s in range(LENGTH)]


@given(tokens=batches(lookahead=1))
def test_head_1_and_attention_are_as_megatron_has_them(tokens: Tensor) -> None:
    """Its `reset_attention_mask` and `eod_mask_loss`, both off by default like ours."""
    documents = document_ids(tokens, END)
    seen = document_attention_bias(documents[:, :LENGTH], torch.float32)[:, 0] == 0
    counts = head_targets(tokens, [1], LENGTH, documents)[0] != IGNORE_INDEX
    for row, seen_of_row, counts_of_row in zip(tokens[:, :LENGTH], seen, counts, strict=True):
        unseen, loss_mask, _ = _get_ltor_masks_and_position_ids(row, END, False, True, True, True)
        assert torch.equal(seen_of_row, ~unseen[0]) and torch.equal(counts_of_row, loss_mask.bool())


KINDS: dict[str, dict[str, Any]] = {
    "parallel of 2 layers": {"layers_per_head": 2},
    "causal": {"kind": "causal"},
    "anticausal": {"kind": "anticausal"},
    "sequential": {"kind": "sequential"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_of_the_reference_is_alone(kind: str) -> None:
    """Its logits are those of a sample of its own: wherever positions start to count, only rounding differs."""
    config = tiny_config(heads=KINDS[kind], model={"init_std": 0.3})
    model = ReferenceModel(config).double()
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(1, 37, (1, length), generator=generator) for length in (5, 11))
    first[0, -1] = END
    samples = torch.cat([first, second], 1)
    together = model(samples, 12, document_ids(samples, END))
    alone = model(second, 7)
    for head, logits in together.items():
        torch.testing.assert_close(logits[:, 5:], alone[head], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(samples, 12)[1][:, 5:], alone[1], atol=1e-2), "and they differ in a stream"
