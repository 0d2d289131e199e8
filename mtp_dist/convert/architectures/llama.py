"""Llama, whose weights Mistral, Qwen2 and Qwen3 have too, with or without biases and norms of queries and keys."""

from pathlib import Path
from typing import Any

from pydantic import PositiveFloat

from mtp_dist.config import ModelConfig
from mtp_dist.convert.architectures.base import Architecture, ConfigKeys, Size
from mtp_dist.convert.rope import read_rope, write_rope

LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}


class RmsNormKeys(ConfigKeys):
    """The keys that Llama, Mistral, Qwen2 and Qwen3 have."""

    head_dim: Size | None = None
    num_key_value_heads: Size | None = None
    hidden_act: str = "silu"
    rms_norm_eps: PositiveFloat = 1e-6

    def model_section(self, source: Path) -> dict[str, Any]:
        has_own_width = self.head_dim is not None and self.head_dim * self.num_attention_heads != self.hidden_size
        return super().model_section(source) | {
            "num_query_groups": self.num_key_value_heads or self.num_attention_heads,
            "kv_channels": self.head_dim if has_own_width else None,
            "norm_eps": self.rms_norm_eps,
            **read_rope(self.model_dump(), source),
        }

    def unsupported(self) -> dict[str, str | None]:
        return super().unsupported() | {
            "hidden_act": None if self.hidden_act == "silu" else "only SwiGLU, which has silu, is supported",
            "partial_rotary_factor": None
            if self.partial_rotary_factor in (None, 1)
            else "rotary embeddings of a part of the channels are not supported",
        }


class LlamaKeys(RmsNormKeys):
    """The keys of a LlamaForCausalLM, and one of similar models that changes what they compute."""

    sliding_window: Size | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None

    def model_section(self, source: Path) -> dict[str, Any]:
        return super().model_section(source) | {"linear_bias": bool(self.attention_bias)}

    def unsupported(self) -> dict[str, str | None]:
        one_bias = None
        if bool(self.attention_bias) != bool(self.mlp_bias):
            one_bias = "biases are supported if attention_bias and mlp_bias are both true"
        return super().unsupported() | {
            "attention_bias": one_bias if self.attention_bias else None,
            "mlp_bias": one_bias,
            "sliding_window": "a Llama has none, a Mistral has" if self.sliding_window else None,
        }


def is_gated_and_sequential(model: ModelConfig) -> bool:
    """Return whether a model has what Llama, Mistral, Qwen2 and Qwen3 share."""
    return (
        model.normalization == "rmsnorm"
        and model.mlp == "swiglu"
        and not model.parallel_residual
        and model.rotary_percent == 1
    )


def is_llama(model: ModelConfig) -> bool:
    has_no_more = not model.qk_norm and model.sliding_window is None and model.has_qkv_bias == model.linear_bias
    return is_gated_and_sequential(model) and has_no_more and model.hidden_size % model.num_attention_heads == 0


def rms_norm_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that Llama, Mistral, Qwen2 and Qwen3 have."""
    return {
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        **write_rope(model),
    }


def llama_keys(model: ModelConfig) -> dict[str, Any]:
    return rms_norm_keys(model) | {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}


LLAMA = Architecture(
    name="LlamaForCausalLM",
    title="Llama",
    model_type="llama",
    keys=LlamaKeys,
    computes=is_llama,
    config_json=llama_keys,
    embedding="model.embed_tokens.weight",
    layers="model.layers",
    layer=LAYER,
    final_norm="model.norm",
    unembedding="lm_head.weight",
)
