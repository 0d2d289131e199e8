"""The section of scaled rotary embeddings, for longer texts than those of the first training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from mtp_dist.config.base import PositiveInt, Section


class RopeScalingConfig(Section):
    """Scaling of RoPE, by the names of Hugging Face."""

    rope_type: Literal["linear", "llama3"]
    """`linear`: multiply every wavelength by `factor`; `llama3`: multiply long ones, keep short ones, interpolate
    between (Llama 3.1). `llama3` needs all other keys, `linear` only `factor`."""
    factor: Annotated[float, Field(ge=1)]
    """Factor by which wavelengths become longer, at least 1."""
    low_freq_factor: PositiveFloat | None = None
    """Wavelengths above `original_max_position_embeddings` over this number are multiplied by the full `factor`."""
    high_freq_factor: PositiveFloat | None = None
    """Wavelengths below `original_max_position_embeddings` over this number are kept."""
    original_max_position_embeddings: PositiveInt | None = None
    """Sequence length, in tokens, of the training before the scaling."""


LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def incompatible_rope_settings(scaling: RopeScalingConfig) -> Iterator[str]:
    """Yield one message per pair of settings that are incompatible."""
    for key in LLAMA3_KEYS:
        value = getattr(scaling, key)
        if scaling.rope_type == "llama3" and value is None:
            yield f"model.rope_scaling.{key} is missing: model.rope_scaling.rope_type = 'llama3' needs it"
        if scaling.rope_type == "linear" and value is not None:
            yield (
                f"model.rope_scaling.{key} = {value} has no effect with model.rope_scaling.rope_type = 'linear': "
                "remove it or use 'llama3'"
            )
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is not None and high is not None and low >= high:
        yield f"model.rope_scaling.low_freq_factor = {low} must lie below model.rope_scaling.high_freq_factor = {high}"
