"""Rotary position embedding (RoPE) of every implementation of the model."""

import math

import torch
from torch import Tensor

from mtp_dist.config import ModelConfig, RopeScalingConfig


def rope_inv_freq(model: ModelConfig, length: int) -> Tensor:
    """Return the inverse frequencies, radians per position of a pair of channels: `[rotary_dim / 2]`, fp32 on the CPU.

    Su et al. 2021 (arXiv:2104.09864, section 3.2.2); `linear` scaling is that of Chen et al. 2023 (arXiv:2306.15595),
    `llama3` that of Llama 3.1, `yarn` that of Peng et al. 2023 (arXiv:2309.00071), `dynamic` NTK scaling, the last
    three as in Hugging Face's `modeling_rope_utils`. length: positions of the samples, on which only `dynamic` depends.
    """
    scaling = model.rope_scaling
    if scaling is None:
        return _unscaled_inv_freq(model.rope_theta, model.rotary_dim)
    if scaling.rope_type == "dynamic":
        return _unscaled_inv_freq(_dynamic_theta(model, scaling, length), model.rotary_dim)
    inv_freq = _unscaled_inv_freq(model.rope_theta, model.rotary_dim)
    scaled = inv_freq / scaling.factor
    if scaling.rope_type == "linear":
        return scaled
    if scaling.rope_type == "yarn":
        kept_share = 1 - _yarn_scaled_share(model, scaling)
        return scaled * (1 - kept_share) + inv_freq * kept_share
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low and high and original, "checked with the configuration"
    turns = inv_freq * original / (2 * math.pi)
    unscaled_share = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(scaled, inv_freq, unscaled_share)


def _unscaled_inv_freq(theta: float, rotary_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def _dynamic_theta(model: ModelConfig, scaling: RopeScalingConfig, length: int) -> float:
    """Return the base for samples of that length, which is `rope_theta` up to the original length."""
    original, dim = scaling.original_max_position_embeddings, model.rotary_dim
    assert original, "checked with the configuration"
    growth = scaling.factor * max(length, original) / original - (scaling.factor - 1)
    return model.rope_theta * growth ** (dim / (dim - 2))


def _yarn_scaled_share(model: ModelConfig, scaling: RopeScalingConfig) -> Tensor:
    """Return the share `[rotary_dim / 2]` of the scaled inverse frequencies: 0 for fast pairs, 1 for slow ones."""
    original, dim = scaling.original_max_position_embeddings, model.rotary_dim
    assert original, "checked with the configuration"

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(model.rope_theta))

    first, last = pair_with_turns(scaling.beta_fast or 32), pair_with_turns(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # no division by 0
    return ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)


def rope_attention_factor(model: ModelConfig) -> float:
    """Return the factor of cosines and sines, 1 unless the scaling is `yarn`."""
    scaling = model.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = math.log(scaling.factor)
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (0.1 * scaling.mscale * growth + 1) / (0.1 * scaling.mscale_all_dim * growth + 1)
    return 0.1 * growth + 1


def rope_angles(model: ModelConfig, length: int) -> Tensor:
    """Return the angles of positions 0..length - 1 as Megatron-core's layers take them: `[length, 1, 1, rotary_dim]`.

    Its own RotaryEmbedding computes them per layer, and its Llama 3 scaling has only one original length and one pair
    of frequency factors.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope_inv_freq(model, length))
    return torch.cat([angles, angles], -1)[:, None, None]
