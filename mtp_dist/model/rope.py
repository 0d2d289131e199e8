"""How fast the rotary position embedding turns, for every implementation of the model."""

import math

import torch
from torch import Tensor

from mtp_dist.config import ModelConfig


def rope_inv_freq(model: ModelConfig) -> Tensor:
    """Radians that each pair of channels turns from one position to the next: `[head_dim / 2]`, fp32 on the CPU.

    Su et al. 2021 (arXiv:2104.09864, section 3.2.2); `linear` scaling is that of Chen et al. 2023 (arXiv:2306.15595),
    `llama3` that of Llama 3.1 as in Hugging Face's `modeling_rope_utils`.
    """
    frequencies = 1.0 / model.rope_theta ** (torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim)
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return slowed
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low and high and length, "checked with the configuration"
    turns = frequencies * length / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(slowed, frequencies, kept)
