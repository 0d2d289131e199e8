"""Which tokens each head must predict."""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""A target that does not count."""


def head_targets(samples: Tensor, distances: Sequence[int], length: int) -> Tensor:
    """Targets `[n, B, S]` of samples `[B, S + lookahead]`: those of a head at distance d are `samples[:, d : d + S]`.

    S is `length`. Position t of head k asks for token t + d_k, with d_k = k in Gloeckle et al. 2024, equation 2, so
    every head has a real label at every position.
    """
    return torch.stack([samples[:, distance : distance + length] for distance in distances])
