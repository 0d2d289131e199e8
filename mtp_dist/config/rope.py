"""The section of scaled rotary embeddings: how a model reads longer texts than its first training had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from mtp_dist.config.base import PositiveInt, Section


class RopeScalingConfig(Section):
    rope_type: Literal["linear", "llama3"]
    """`linear`: every wavelength is `factor` times as long; `llama3`: long ones are, short ones stay, those between
    change smoothly from one to the other (Llama 3.1). `llama3` needs all the other keys, `linear` only `factor`."""
    factor: Annotated[float, Field(ge=1)]
    """How many times as long wavelengths become, 1 at least."""
    low_freq_factor: PositiveFloat | None = None
    """Wavelengths above `original_max_position_embeddings` over this number become longer by the whole `factor`."""
    high_freq_factor: PositiveFloat | None = None
    """Wavelengths below `original_max_position_embeddings` over this number stay."""
    original_max_position_embeddings: PositiveInt | None = None
    """Tokens of the longest text of the training before the scaling."""


LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def incompatible_rope_settings(scaling: RopeScalingConfig) -> Iterator[str]:
    """Yield one sentence for each pair of keys that cannot stand together."""
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
