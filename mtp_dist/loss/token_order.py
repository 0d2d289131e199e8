"""The order of the upcoming tokens as soft targets (token-order prediction, arXiv:2508.19228)."""

import torch
from torch import Tensor

from mtp_dist.loss.objective import SoftTargets


def token_order_targets(
    samples: Tensor, length: int, window: int, valid: Tensor, documents: Tensor | None = None
) -> SoftTargets:
    """Return ListNet's targets for positions 1..S of samples `[B, S + window or more]`, in rows of s * B + b.

    length: S. A token whose next occurrence is d <= window positions ahead has the score window - d, every other token
    -inf; the probabilities are the softmax of the scores. valid: `[B, S]`, positions that count. If documents, shaped
    like samples, are given, only occurrences in the position's own document count; each valid position has one.
    """
    upcoming = samples[:, 1 : length + window].unfold(1, window, 1)
    unranked = torch.zeros_like(upcoming, dtype=torch.bool)
    for apart in range(1, window):
        unranked[..., apart:] |= upcoming[..., apart:] == upcoming[..., :-apart]
    if documents is not None:
        unranked |= documents[:, 1 : length + window].unfold(1, window, 1) != documents[:, :length, None]
    scores = -torch.arange(window, device=samples.device, dtype=torch.float32)
    probabilities = scores.expand(upcoming.shape).masked_fill(unranked, float("-inf")).softmax(-1)
    # Not a product: the softmax of a position without a ranked token is NaN.
    probabilities = probabilities.where(valid.unsqueeze(-1), 0.0)
    token_ids, probabilities = (x.transpose(0, 1).flatten(0, 1).contiguous() for x in (upcoming, probabilities))
    return SoftTargets(token_ids, probabilities)
