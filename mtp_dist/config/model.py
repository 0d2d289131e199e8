"""The section of the model: the sizes of its layers and the building blocks that they consist of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from mtp_dist.config.base import PositiveInt, Section
from mtp_dist.config.rope import RopeScalingConfig, incompatible_rope_settings


class ModelConfig(Section):
    """The architecture of the trunk; the transformer layers of the heads have the same building blocks."""

    hidden_size: PositiveInt
    """Width D of the trunk."""
    trunk_layers: Annotated[PositiveInt, Field(le=10_000)]
    """Transformer layers of the trunk. A parameter-matched comparison of models with heads of one layer
    keeps `trunk_layers + heads.count` constant."""
    num_attention_heads: PositiveInt
    """Query heads of each attention layer."""
    num_query_groups: PositiveInt | None = None
    """Key-value heads (grouped-query attention); by default as many as `num_attention_heads`."""
    kv_channels: PositiveInt | None = None
    """Width of one attention head, in channels; by default `hidden_size / num_attention_heads`."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP; by default 8/3 of `hidden_size`, rounded up to a multiple of 64, or 4 times `hidden_size` with
    `mlp: gelu`."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """`swiglu`: SiLU with a gate, as in Llama; `gelu`: exact GELU without a gate, as in GPT-NeoX."""
    vocab_size: PositiveInt | None = None
    """Vocabulary size, in tokens, before padding; by default the tokenizer's."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding's wavelengths."""
    rope_scaling: RopeScalingConfig | None = None
    """Scaling of the wavelengths, for texts longer than those of an earlier training; by default none."""
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of each attention head's channels that the rotary position embedding rotates, the first ones (GPT-NeoX:
    0.25)."""
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm before attention, MLP and unembedding, and of `sequential` heads. `layernorm` has a bias (GPT-NeoX)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the norms."""
    qk_norm: bool = False
    """RMSNorm over the channels of each query and key head, before the rotary position embedding (Qwen3)."""
    qkv_bias: bool = False
    """Biases on the projection to queries, keys and values (Qwen2)."""
    linear_bias: bool = False
    """Biases on all four projections of a layer: queries, keys and values; attention output; both of the MLP
    (GPT-NeoX)."""
    parallel_residual: bool = False
    """Attention and MLP read the same hidden states, x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own
    (GPT-NeoX). By default the MLP reads those after the attention."""
    sliding_window: PositiveInt | None = None
    """Positions that each position attends to, itself and those before it (Mistral); by default all."""
    tie_embeddings: bool = False
    """Share the weight of the embedding with the unembedding."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections into the residual stream use it divided by sqrt(2 *
    depth)."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return 4 * self.hidden_size if self.mlp == "gelu" else -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def fc1_size(self) -> int:
        """Rows of the MLP's first matrix."""
        return self.ffn_size if self.mlp == "gelu" else 2 * self.ffn_size

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def attention_size(self) -> int:
        """Channels of all query heads, which the attention output is projected from."""
        return self.num_attention_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Channels of all queries, keys and values."""
        return self.attention_size + 2 * self.query_groups * self.head_dim

    @property
    def dynamic_length(self) -> int | None:
        """Tokens beyond which each further one changes the rotary embedding; None without `dynamic` scaling."""
        scaling = self.rope_scaling
        return scaling.original_max_position_embeddings if scaling and scaling.rope_type == "dynamic" else None

    @property
    def rotary_dim(self) -> int:
        """Channels of one attention head that the rotary position embedding rotates."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def has_qkv_bias(self) -> bool:
        return self.qkv_bias or self.linear_bias


def layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a transformer layer's parameters by Megatron-core's names, in the forward pass's order."""
    shapes = norm_shapes("input_layernorm", model)
    shapes |= _linear_shapes("self_attention.linear_qkv", model.qkv_size, model.hidden_size, model.has_qkv_bias)
    if model.qk_norm:
        shapes |= {f"self_attention.{name}_layernorm.weight": (model.head_dim,) for name in ("q", "k")}
    bias = model.linear_bias
    shapes |= _linear_shapes("self_attention.linear_proj", model.hidden_size, model.attention_size, bias)
    shapes |= norm_shapes("pre_mlp_layernorm", model)
    shapes |= _linear_shapes("mlp.linear_fc1", model.fc1_size, model.hidden_size, bias)
    return shapes | _linear_shapes("mlp.linear_fc2", model.hidden_size, model.ffn_size, bias)


def norm_shapes(name: str, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a norm of hidden states."""
    parameters = ("weight", "bias") if model.normalization == "layernorm" else ("weight",)
    return {f"{name}.{parameter}": (model.hidden_size,) for parameter in parameters}


def _linear_shapes(name: str, outputs: int, inputs: int, has_bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if has_bias else {})


def incompatible_model_settings(model: ModelConfig) -> Iterator[str]:
    """Yield one message per pair of settings that are incompatible."""
    heads_key, heads = "model.num_attention_heads", model.num_attention_heads
    is_divisible = bool(model.kv_channels) or model.hidden_size % heads == 0
    if not is_divisible:
        yield (
            f"model.hidden_size = {model.hidden_size} is not divisible by {heads_key} = {heads}: change one of the two "
            "or set model.kv_channels"
        )
    if heads % model.query_groups:
        yield (
            f"{heads_key} = {heads} is not divisible by model.num_query_groups = {model.query_groups}: change one of "
            "the two"
        )
    if is_divisible and (model.rotary_dim < 2 or model.rotary_dim % 2):
        width = "model.kv_channels" if model.kv_channels else f"model.hidden_size / {heads_key}"
        if model.rotary_percent < 1:
            width += f" * model.rotary_percent = {model.head_dim} * {model.rotary_percent:g}"
        yield (
            f"{width} = {model.rotary_dim} is {'odd' if model.rotary_dim % 2 else 'too small'}: rotary "
            "embeddings need an even number of channels in an attention head"
        )
    elif is_divisible and model.rope_scaling:
        yield from incompatible_rope_settings(model.rope_scaling, model.rope_theta, model.rotary_dim)
