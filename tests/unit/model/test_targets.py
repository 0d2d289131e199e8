"""Which tokens the heads must predict."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.model.targets import head_targets


def test_by_hand() -> None:
    samples = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    assert head_targets(samples, [1, 2], 3).tolist() == [
        [[11, 12, 13], [21, 22, 23]],
        [[12, 13, 14], [22, 23, 24]],
    ]


@given(heads=st.integers(1, 8), length=st.integers(1, 20), batch=st.integers(1, 4))
def test_head_k_at_position_t_asks_for_token_t_plus_k(heads: int, length: int, batch: int) -> None:
    samples = torch.arange(batch * (length + heads)).view(batch, length + heads)
    targets = head_targets(samples, range(1, heads + 1), length)
    assert targets.shape == (heads, batch, length)
    for k in range(1, heads + 1):
        assert torch.equal(targets[k - 1], samples[:, k : k + length])
        assert torch.equal(targets[k - 1], samples[:, :length] + k)


def test_leaps_and_tokens_that_only_others_read() -> None:
    samples = torch.arange(10, 20)[None]
    assert head_targets(samples, [1, 3], 4).tolist() == [[[11, 12, 13, 14]], [[13, 14, 15, 16]]]
