"""The section of scaled rotary embeddings, for longer texts than those of the first training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveFloat

from mtp_dist.config.base import PositiveInt, Section, messages_if

RopeType = Literal["linear", "llama3", "yarn", "dynamic"]


class RopeScalingConfig(Section):
    """Scaling of RoPE, by the names of Hugging Face."""

    rope_type: RopeType
    """`linear`: multiply every wavelength by `factor`; `llama3`: multiply long ones, keep short ones, interpolate
    between (Llama 3.1); `yarn`: likewise, by other bounds, and scale the attention logits (arXiv:2309.00071);
    `dynamic`: raise `rope_theta` with the length of samples above `original_max_position_embeddings` (NTK)."""
    factor: Annotated[float, Field(ge=1)]
    """Factor by which wavelengths become longer, at least 1."""
    low_freq_factor: PositiveFloat | None = None
    """Of `llama3`: wavelengths above `original_max_position_embeddings` over this number are multiplied by the full
    `factor`."""
    high_freq_factor: PositiveFloat | None = None
    """Of `llama3`: wavelengths below `original_max_position_embeddings` over this number are kept."""
    original_max_position_embeddings: PositiveInt | None = None
    """Sequence length, in tokens, of the training before the scaling; needed by all types but `linear`. For `dynamic`
    it is transformers' `max_position_embeddings`."""
    beta_fast: PositiveFloat | None = None
    """Of `yarn`: turns within the original length above which a wavelength is kept; by default 32."""
    beta_slow: PositiveFloat | None = None
    """Of `yarn`: turns within the original length below which a wavelength is multiplied by the full `factor`; by
    default 1."""
    mscale: PositiveFloat | None = None
    """Of `yarn`: with `mscale_all_dim`, the attention factor is (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim
    ln(factor) + 1)."""
    mscale_all_dim: PositiveFloat | None = None
    """Of `yarn`: see `mscale`."""
    attention_factor: PositiveFloat | None = None
    """Of `yarn`: factor of cosines and sines, so that its square scales the attention logits; by default 0.1
    ln(factor) + 1."""
    truncate: bool | None = None
    """Of `yarn`: round the bounds of the interpolation to whole pairs of channels; by default true."""


class RopeKeys(NamedTuple):
    """Keys of a rope type besides `factor`."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


ORIGINAL_LENGTH = "original_max_position_embeddings"
ROPE_KEYS: dict[RopeType, RopeKeys] = {
    "linear": RopeKeys(),
    "llama3": RopeKeys(("low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH)),
    "yarn": RopeKeys(
        (ORIGINAL_LENGTH,), ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")
    ),
    "dynamic": RopeKeys((ORIGINAL_LENGTH,)),
}


def incompatible_rope_settings(scaling: RopeScalingConfig, theta: float, rotary_dim: int) -> Iterator[str]:
    """Yield one message per pair of settings that are incompatible. rotary_dim: rotated channels of a head."""
    section, kind = "model.rope_scaling", scaling.rope_type
    required, optional = ROPE_KEYS[kind]
    for key, value in scaling:
        if key in required and value is None:
            yield f"{section}.{key} is missing: {section}.rope_type = '{kind}' needs it"
        if key not in ("rope_type", "factor", *required, *optional) and value is not None:
            types = " or ".join(f"'{name}'" for name, keys in ROPE_KEYS.items() if key in keys.required + keys.optional)
            yield (
                f"{section}.{key} = {value} has no effect with {section}.rope_type = '{kind}': remove it or use {types}"
            )
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is not None and high is not None and low >= high:
        yield f"{section}.low_freq_factor = {low} must lie below {section}.high_freq_factor = {high}"
    yield from messages_if(
        (
            kind == "yarn" and theta <= 1,
            f"{section}.rope_type = 'yarn' needs model.rope_theta above 1, it is {theta:g}: raise it",
        ),
        (
            kind == "yarn" and (scaling.beta_slow or 1) >= (scaling.beta_fast or 32),
            f"{section}.beta_slow = {scaling.beta_slow or 1:g} must lie below {section}.beta_fast = "
            f"{scaling.beta_fast or 32:g}",
        ),
        (
            (scaling.mscale is None) != (scaling.mscale_all_dim is None),
            f"{section}.mscale and {section}.mscale_all_dim belong together: give both or neither",
        ),
        (
            scaling.mscale is not None and scaling.attention_factor is not None,
            f"{section}.mscale has no effect with {section}.attention_factor = {scaling.attention_factor}: remove one",
        ),
        (
            kind == "dynamic" and rotary_dim == 2,
            f"{section}.rope_type = 'dynamic' needs more than 2 rotated channels in an attention head: use another "
            "type or a larger model.rotary_percent",
        ),
    )
