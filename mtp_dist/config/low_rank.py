"""The section of low-rank adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from mtp_dist.config.base import PositiveInt, Section

AdaptedMatrix = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class LowRankConfig(Section):
    """Low-rank adapters: W x + (alpha / rank) B A x with a frozen W (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    rank: PositiveInt = 8
    """Rows of A and columns of B; peft's `r`."""
    alpha: PositiveFloat = 16.0
    """Numerator of the factor of the product B A, alpha / rank; peft's `lora_alpha`."""
    targets: Annotated[tuple[AdaptedMatrix, ...], Field(strict=False, min_length=1)] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    """Matrices of each layer with an adapter, by default all: `linear_qkv` (a Llama's q_proj, k_proj and v_proj, with
    one A), `linear_proj` (o_proj), `linear_fc1` (gate_proj and up_proj, with one A), `linear_fc2` (down_proj)."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
