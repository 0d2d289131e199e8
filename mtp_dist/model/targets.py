"""Which tokens each head must predict."""

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""A target that does not count."""


def head_targets(samples: Tensor, heads: int) -> Tensor:
    """Targets `[n, B, S]` of samples `[B, S + n]`: head k's are `samples[:, k : k + S]`.

    Position t of head k asks for token t + k (Gloeckle et al. 2024, equation 2), so every head has a real label at
    every position.
    """
    length = samples.shape[1] - heads
    return torch.stack([samples[:, k : k + length] for k in range(1, heads + 1)])
