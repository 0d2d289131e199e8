"""GPT-NeoX, the architecture of Pythia: LayerNorm, biases, an MLP without a gate, and a parallel residual.

Its fused matrix has the rows of query, key and value of one attention head after those of another, which is mtp_dist's
order for as many query groups as attention heads.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat

from mtp_dist.config import ModelConfig
from mtp_dist.convert.architectures.base import Architecture, ConfigKeys
from mtp_dist.convert.rope import read_rope, write_rope

LAYER: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("attention.query_key_value",),
    "self_attention.linear_proj": ("attention.dense",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.dense_h_to_4h",),
    "mlp.linear_fc2": ("mlp.dense_4h_to_h",),
}


class GPTNeoXKeys(ConfigKeys):
    """The keys of a GPTNeoXForCausalLM."""

    hidden_act: str = "gelu"
    layer_norm_eps: PositiveFloat = 1e-5
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = 0.25
    rotary_emb_base: PositiveFloat = 10000.0
    use_parallel_residual: bool = True
    attention_bias: bool = True

    def model_section(self, source: Path) -> dict[str, Any]:
        rotary = {"rope_theta": self.rotary_emb_base, "partial_rotary_factor": self.rotary_pct}
        return super().model_section(source) | {
            "num_query_groups": self.num_attention_heads,
            "norm_eps": self.layer_norm_eps,
            "normalization": "layernorm",
            "mlp": "gelu",
            "linear_bias": True,
            "parallel_residual": self.use_parallel_residual,
            **read_rope(self.model_dump() | rotary, source, has_partial=True),
        }

    def unsupported(self) -> dict[str, str | None]:
        return super().unsupported() | {
            "hidden_act": None if self.hidden_act == "gelu" else "only gelu, the exact one, is supported",
            "attention_bias": None if self.attention_bias else "only attention with biases is supported",
        }


def is_gpt_neox(model: ModelConfig) -> bool:
    return (
        model.normalization == "layernorm"
        and model.mlp == "gelu"
        and model.linear_bias
        and not model.qk_norm
        and model.sliding_window is None
        and model.query_groups == model.num_attention_heads
        and model.attention_size == model.hidden_size
    )


def gpt_neox_keys(model: ModelConfig) -> dict[str, Any]:
    rope = write_rope(model)
    del rope["rope_theta"]
    rope["rope_parameters"]["partial_rotary_factor"] = model.rotary_percent  # a Llama's default is 1, this one's 0.25
    return rope | {
        "rotary_emb_base": model.rope_theta,
        "rotary_pct": model.rotary_percent,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
    }


GPT_NEOX = Architecture(
    name="GPTNeoXForCausalLM",
    title="GPT-NeoX",
    model_type="gpt_neox",
    keys=GPTNeoXKeys,
    computes=is_gpt_neox,
    config_json=gpt_neox_keys,
    embedding="gpt_neox.embed_in.weight",
    layers="gpt_neox.layers",
    layer=LAYER,
    final_norm="gpt_neox.final_layer_norm",
    unembedding="embed_out.weight",
    renamed={"lm_head.weight": "embed_out.weight"},  # as transformers 5 names it
    buffers=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
)
