"""The transformer layer that trunk and heads are made of, assembled from Megatron-core's parts."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtp_dist.config import Config, LowRankConfig, ModelConfig
from mtp_dist.model.linear import AdaptedColumnLinear, AdaptedRowLinear, RowLinear
from mtp_dist.model.rope import rope_attention_factor


def call_recomputed(is_enabled: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the function's result. If enabled keep no activations of it: the backward pass computes them again."""
    if not is_enabled or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    # Without dropout a recomputation draws no random numbers, so no generator state needs saving.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class AttentionInputs(NamedTuple):
    """Inputs that all attention layers of a stage share, for the whole sequence."""

    rope_angles: Tensor
    """See `rope_angles`."""
    bias: Tensor | None
    """See `attention_bias`; None if each position attends to itself and all positions before it."""


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) of `[..., D]`, replicated over the tensor-parallel ranks.

    Under sequence parallelism every rank has its own part of the sequence, so the weight's gradient is a sum over the
    tensor-parallel group. Passing the weight through the copy-to-region mapping makes that sum part of the backward
    graph: it happens exactly once however often or wherever the backward pass runs, which a tensor hook does not
    guarantee.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.grad_is_partial = config.sequence_parallel
        """True if the gradient of this rank is one of a part of the activations."""

    def forward(self, hidden: Tensor, frozen: bool = False) -> Tensor:
        """Normalize. If frozen, pass no gradient to the weight."""
        weight = self._shared(self.weight, frozen)
        return F.rms_norm(hidden, weight.shape, weight, self.eps)

    def _shared(self, param: Tensor, frozen: bool) -> Tensor:
        """Return the parameter, with its gradient summed over the tensor-parallel ranks if need be."""
        param = param.detach() if frozen else param
        return copy_to_tensor_model_parallel_region(param) if self.grad_is_partial else param


class LayerNorm(RMSNorm):
    """Layer norm with a bias (Ba et al. 2016) of `[..., D]`, replicated like RMSNorm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: Tensor, frozen: bool = False) -> Tensor:
        weight, bias = (self._shared(param, frozen) for param in (self.weight, self.bias))
        if hidden.dtype == torch.bfloat16 and not hidden.is_cuda:
            # PyTorch's kernel for CPUs sums these gradients in bf16, with an error of 10 % after 16,384 positions.
            return torch.addcmul(bias, F.layer_norm(hidden, weight.shape, eps=self.eps), weight)
        return F.layer_norm(hidden, weight.shape, weight, bias, self.eps)


class AttentionHeadNorm(RMSNorm):
    """RMSNorm over the channels of each query or key head, `[S, B, heads, head_dim]`.

    Each tensor-parallel rank has its own attention heads, so the gradient of the replicated weight is always a sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.grad_is_partial = True


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
"""Norms of hidden states, by Megatron-core's names."""


class CausalAttention(nn.Module):
    """Core attention by PyTorch's `scaled_dot_product_attention`, on this rank's attention heads."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, **_: Any) -> None:
        super().__init__()
        self.grouped = config.num_query_groups != config.num_attention_heads
        self.rotary_dim, self.rope_factor = model.rotary_dim, rope_attention_factor(model)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, attention_bias: Tensor | None, **__: Any
    ) -> Tensor:
        """Map query `[S, B, heads, head_dim]`, key and value `[S, B, groups, head_dim]` to `[S, B, heads * head_dim]`.

        attention_bias: see AttentionInputs.
        """
        if self.rope_factor != 1:  # of rotated queries and keys, which Megatron-core rotates without it
            rotated, others = query[..., : self.rotary_dim], query[..., self.rotary_dim :]
            query = torch.cat([rotated * self.rope_factor**2, others], -1)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_bias is None:
            context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        else:
            # With grouped queries and a bias PyTorch may fall back, on GPUs, to a kernel that keeps all S x S scores.
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_bias)
        return context.permute(2, 0, 1, 3).flatten(2)


def layer_submodules(
    model: ModelConfig, megatron: TransformerConfig, low_rank: LowRankConfig | None
) -> TransformerLayerSubmodules:
    """Return the parts of a layer. Matrices that low_rank targets have an adapter."""
    norm, head_norm = NORMS[megatron.normalization], AttentionHeadNorm if model.qk_norm else None

    def linear(name: str, plain: type[nn.Module], adapted: type[nn.Module]) -> ModuleSpec:
        if low_rank is None or name not in low_rank.targets:
            return ModuleSpec(module=plain)
        return ModuleSpec(module=adapted, params={"low_rank": low_rank})

    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=linear("linear_qkv", ColumnParallelLinear, AdaptedColumnLinear),
                core_attention=partial(CausalAttention, model=model),
                linear_proj=linear("linear_proj", RowLinear, AdaptedRowLinear),
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(
                linear_fc1=linear("linear_fc1", ColumnParallelLinear, AdaptedColumnLinear),
                linear_fc2=linear("linear_fc2", RowLinear, AdaptedRowLinear),
            ),
        ),
        mlp_bda=get_bias_dropout_add,
    )


def transformer_config(config: Config) -> TransformerConfig:
    """Return Megatron-core's description of all layers, which have grouped queries and RoPE."""
    model, gated = config.model, config.model.mlp == "swiglu"
    return TransformerConfig(
        num_layers=model.trunk_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        activation_func=F.silu if gated else F.gelu,
        gated_linear_unit=gated,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence,
        deterministic_mode=config.train.deterministic,
        use_cpu_initialization=True,
        # The initial values come from model/parameters.py, independent of the layout.
        perform_initialization=False,
    )


class DecoderLayer(TransformerLayer):  # type: ignore[misc]
    """One pre-norm causal transformer layer: hidden `[S, B, D]` (`[S/TP, B, D]` under sequence parallelism) -> same.

    Recomputes nothing, its MLP or all of itself in the backward pass (`train.activation_checkpointing`). What its
    attention shares with other layers is an argument, so that a recomputation gets the same.
    """

    def __init__(self, config: Config, megatron: TransformerConfig, layer_number: int) -> None:
        submodules = layer_submodules(config.model, megatron, config.train.low_rank)
        super().__init__(megatron, submodules, layer_number=layer_number)
        self.activation_checkpointing = config.train.activation_checkpointing
        self.parallel_residual = config.model.parallel_residual

    def forward(self, hidden: Tensor, attention: AttentionInputs) -> Tensor:
        return call_recomputed(self.activation_checkpointing == "full", self._layer, hidden, attention)

    def _layer(self, hidden: Tensor, attention: AttentionInputs) -> Tensor:
        shared = {"rotary_pos_emb": attention.rope_angles, "attention_bias": attention.bias}
        if not self.parallel_residual:
            output, _ = super().forward(hidden, **shared)
            return output
        attended, _ = self._forward_attention(hidden, **shared)
        is_recomputed = self.activation_checkpointing == "selective"
        mlp_output = call_recomputed(is_recomputed, lambda x: self.mlp(self.pre_mlp_layernorm(x)), hidden)
        return self.mlp_bda(self.training, self.config.bias_dropout_fusion)(mlp_output, attended, self.hidden_dropout)

    def _forward_mlp(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_recomputed = self.activation_checkpointing == "selective"
        return call_recomputed(is_recomputed, super()._forward_mlp, hidden, *args, **kwargs)
