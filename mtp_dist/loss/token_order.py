"""The order of the upcoming tokens as soft targets (token-order prediction, arXiv:2508.19228)."""

import torch
from torch import Tensor

from mtp_dist.loss.linear_cross_entropy import SoftTargets


def token_order_targets(
    samples: Tensor, length: int, window: int, valid: Tensor, documents: Tensor | None = None
) -> SoftTargets:
    """ListNet's targets for positions 1..S of samples `[B, S + window or more]`, position by position, S = `length`.

    A token whose next occurrence is d <= window positions ahead has the score window - d, every other one -inf; the
    probabilities are the softmax of the scores. valid `[B, S]`: positions that count. Where `documents`, shaped like
    samples, are given, only occurrences in the position's own one do, and valid positions have a token to rank there.
    """
    upcoming = samples[:, 1 : length + window].unfold(1, window, 1)
    unranked = torch.zeros_like(upcoming, dtype=torch.bool)
    for apart in range(1, window):
        unranked[..., apart:] |= upcoming[..., apart:] == upcoming[..., :-apart]
    if documents is not None:
        unranked |= documents[:, 1 : length + window].unfold(1, window, 1) != documents[:, :length, None]
    scores = -torch.arange(window, device=samples.device, dtype=torch.float32)
    probabilities = scores.expand(upcoming.shape).masked_fill(unranked, float("-inf")).softmax(-1)
    # Not a product: where nothing is ranked the softmax is NaN.
    probabilities = probabilities.where(valid.unsqueeze(-1), 0.0)
    return SoftTargets(*(tensor.transpose(0, 1).flatten(0, 1).contiguous() for tensor in (upcoming, probabilities)))
