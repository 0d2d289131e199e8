"""Rotary position embedding (RoPE) of every implementation of the model."""

import math

import torch
from torch import Tensor

from mtp_dist.config import ModelConfig


def rope_inv_freq(model: ModelConfig) -> Tensor:
    """Return the inverse frequencies, radians per position of each pair of channels: `[head_dim / 2]`, fp32 on the CPU.

    Su et al. 2021 (arXiv:2104.09864, section 3.2.2); `linear` scaling is that of Chen et al. 2023 (arXiv:2306.15595),
    `llama3` that of Llama 3.1 as in Hugging Face's `modeling_rope_utils`.
    """
    inv_freq = 1.0 / model.rope_theta ** (torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim)
    scaling = model.rope_scaling
    if scaling is None:
        return inv_freq
    scaled = inv_freq / scaling.factor
    if scaling.rope_type == "linear":
        return scaled
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low and high and length, "checked with the configuration"
    turns = inv_freq * length / (2 * math.pi)
    unscaled_share = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(scaled, inv_freq, unscaled_share)


def rope_angles(model: ModelConfig, length: int) -> Tensor:
    """Return the angles of positions 0..length - 1 as Megatron-core's layers take them: `[length, 1, 1, head_dim]`.

    Its own RotaryEmbedding computes them per layer, and its Llama 3 scaling has only one original length and one pair
    of frequency factors.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope_inv_freq(model))
    return torch.cat([angles, angles], -1)[:, None, None]
