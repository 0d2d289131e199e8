"""Qwen3: a Llama with norms on queries and keys, whose attention heads may have another width."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mtp_dist.config import ModelConfig
from mtp_dist.convert.architectures.base import Size
from mtp_dist.convert.architectures.llama import LLAMA, is_gated_and_sequential
from mtp_dist.convert.architectures.qwen2 import QwenKeys, qwen_keys


class Qwen3Keys(QwenKeys):
    """The keys of a Qwen3ForCausalLM."""

    head_dim: Size | None = 128
    attention_bias: bool | None = None

    def model_section(self, source: Path) -> dict[str, Any]:
        return super().model_section(source) | {"qk_norm": True}

    def unsupported(self) -> dict[str, str | None]:
        why = "biases of the attention without biases of the MLP are not supported"
        return super().unsupported() | {
            "attention_bias": why if self.attention_bias else None,
            "head_dim": "it is the width of an attention head" if self.head_dim is None else None,
        }


def is_qwen3(model: ModelConfig) -> bool:
    return is_gated_and_sequential(model) and model.qk_norm and not model.has_qkv_bias


def qwen3_keys(model: ModelConfig) -> dict[str, Any]:
    return qwen_keys(model) | {"attention_bias": False}


QWEN3 = replace(
    LLAMA,
    name="Qwen3ForCausalLM",
    title="Qwen3",
    model_type="qwen3",
    keys=Qwen3Keys,
    computes=is_qwen3,
    config_json=qwen3_keys,
)
