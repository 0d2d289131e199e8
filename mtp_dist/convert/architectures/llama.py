"""Llama, and models of transformers that differ from it in few keys."""

from pathlib import Path
from typing import Any

from pydantic import PositiveFloat

from mtp_dist.config import Config
from mtp_dist.convert.architectures.base import Architecture, ConfigKeys, Size
from mtp_dist.convert.rope import write_rope

LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}


class LlamaKeys(ConfigKeys):
    """The keys of a LlamaForCausalLM, and those of similar models that change what it computes."""

    num_key_value_heads: Size | None = None
    hidden_act: str = "silu"
    rms_norm_eps: PositiveFloat = 1e-6
    sliding_window: Size | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None

    def model_section(self, source: Path) -> dict[str, Any]:
        return super().model_section(source) | {
            "num_query_groups": self.num_key_value_heads or self.num_attention_heads,
            "norm_eps": self.rms_norm_eps,
        }

    def unsupported(self) -> dict[str, str | None]:
        return super().unsupported() | {
            "attention_bias": "biases of attention are not supported" if self.attention_bias else None,
            "mlp_bias": "biases of the MLP are not supported" if self.mlp_bias else None,
            "sliding_window": "attention to a window of positions is not supported" if self.sliding_window else None,
            "hidden_act": None if self.hidden_act == "silu" else "only SwiGLU, which has silu, is supported",
        }


def llama_keys(config: Config) -> dict[str, Any]:
    """Return the keys of config.json of a Llama."""
    model = config.model
    return {
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        **write_rope(model),
        "attention_bias": False,
        "mlp_bias": False,
    }


LLAMA = Architecture(
    name="LlamaForCausalLM",
    title="Llama",
    model_type="llama",
    keys=LlamaKeys,
    embedding="model.embed_tokens.weight",
    layers="model.layers",
    layer=LAYER,
    final_norm="model.norm.weight",
    unembedding="lm_head.weight",
    config_json=llama_keys,
)
