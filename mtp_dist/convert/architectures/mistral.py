"""Mistral, a Llama whose attention may see only a window of positions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mtp_dist.config import ModelConfig
from mtp_dist.convert.architectures.base import Size
from mtp_dist.convert.architectures.llama import LLAMA, RmsNormKeys, is_gated_and_sequential, rms_norm_keys


class MistralKeys(RmsNormKeys):
    """The keys of a MistralForCausalLM."""

    max_position_embeddings: Size = 131072
    num_key_value_heads: Size | None = 8
    sliding_window: Size | None = 4096

    def model_section(self, source: Path) -> dict[str, Any]:
        return super().model_section(source) | {"sliding_window": self.sliding_window}


def is_mistral(model: ModelConfig) -> bool:
    return is_gated_and_sequential(model) and not model.qk_norm and not model.has_qkv_bias


def mistral_keys(model: ModelConfig) -> dict[str, Any]:
    return rms_norm_keys(model) | {"sliding_window": model.sliding_window}


MISTRAL = replace(
    LLAMA,
    name="MistralForCausalLM",
    title="Mistral",
    model_type="mistral",
    keys=MistralKeys,
    computes=is_mistral,
    config_json=mistral_keys,
)
