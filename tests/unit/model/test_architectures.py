"""The reference with the building blocks of other architectures equals transformers' own models of these."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mtp_dist.model.reference import ReferenceModel
from tests.tiny import BLOCKS, VOCAB_SIZE, tiny_config
from tests.unit.model.test_reference import lively_model, random_tokens

LAYER = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
NEOX_LAYER = {
    "self_attention.linear_qkv": ("attention.query_key_value",),
    "self_attention.linear_proj": ("attention.dense",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.dense_h_to_4h",),
    "mlp.linear_fc2": ("mlp.dense_4h_to_h",),
}
MODULES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "unembedding": "lm_head"}
NEOX_MODULES = {"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "unembedding": "lm_head"}
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}


def renamed(model: ReferenceModel, architecture: str) -> dict[str, Tensor]:
    """Return the weights of trunk and head 1 by transformers' names."""
    neox, shape, theirs = architecture == "neox", model.config.model, dict[str, Tensor]()
    for name, weight in model.named_weights().items():
        weight, (module, _, kind) = weight.detach(), name.rpartition(".")
        if module in MODULES:
            theirs[f"{(NEOX_MODULES if neox else MODULES)[module]}.{kind}"] = weight
            continue
        layer, _, part = (
            module.replace("heads.1.0.", f"trunk.{shape.trunk_layers}.").removeprefix("trunk.").partition(".")
        )
        parts = (NEOX_LAYER if neox else LAYER).get(part, (part,))
        values: tuple[Tensor, ...] = (weight,)
        if part.endswith("linear_qkv") and not neox:
            groups = weight.unflatten(0, (shape.query_groups, -1, shape.head_dim))
            values = tuple(group.flatten(0, 2) for group in groups.split([groups.shape[1] - 2, 1, 1], 1))
        elif part.endswith("linear_fc1") and not neox:
            values = weight.chunk(2)
        prefix = f"{'gpt_neox' if neox else 'model'}.layers.{layer}"
        theirs |= {f"{prefix}.{part}.{kind}": value for part, value in zip(parts, values, strict=True)}
    return theirs


def in_transformers(model: ReferenceModel, architecture: str, **values: Any) -> PreTrainedModel:
    """Return transformers' model with the weights of trunk and head 1."""
    shape = model.config.model
    config_class, model_class = ARCHITECTURES[architecture]
    scaling = shape.rope_scaling.model_dump(exclude_none=True) if shape.rope_scaling else {"rope_type": "default"}
    rope = {**scaling, "rope_theta": shape.rope_theta, "partial_rotary_factor": shape.rotary_percent}
    positions = rope.pop("original_max_position_embeddings") if scaling["rope_type"] == "dynamic" else 128
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.trunk_layers + 1,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.query_groups,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn_size,
        rms_norm_eps=shape.norm_eps,
        layer_norm_eps=shape.norm_eps,
        max_position_embeddings=positions,
        rope_parameters=rope,
        tie_word_embeddings=shape.tie_embeddings,
        attn_implementation="sdpa",
        **values,
    )
    network: PreTrainedModel = model_class(config).double()
    report = network.load_state_dict(renamed(model, architecture), strict=False)
    assert not report.unexpected_keys and report.missing_keys == (["lm_head.weight"] if shape.tie_embeddings else [])
    for module in network.modules():
        if isinstance(module, RMS_NORMS):  # transformers computes it in fp32
            module.forward = partial(
                F.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=shape.norm_eps
            )
    return network


RMS_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.1}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("qwen2", {**BLOCKS["qwen2"], "tie_embeddings": True}, {}),
    "qwen3": ("qwen3", BLOCKS["qwen3"], {}),
    "neox": ("neox", BLOCKS["neox"], {}),
    "neox, tied, one residual after the other": (
        "neox",
        {**BLOCKS["neox"], "tie_embeddings": True, "parallel_residual": False},
        {"use_parallel_residual": False},
    ),
    "mistral": ("mistral", BLOCKS["mistral"], BLOCKS["mistral"]),
    "mistral, window of one": ("mistral", {"sliding_window": 1}, {"sliding_window": 1}),
    "yarn": ("llama", {"rope_scaling": YARN}, {}),
    "yarn, not truncated": ("llama", {"rope_scaling": {**YARN, "truncate": False}}, {}),
    "yarn, mscale": ("llama", {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}, {}),
    "yarn, attention factor": ("qwen3", {**BLOCKS["qwen3"], "rope_scaling": {**YARN, "attention_factor": 1.7}}, {}),
    "yarn, partial rotary": ("neox", {**BLOCKS["neox"], "rope_scaling": YARN}, {}),
    "dynamic": ("llama", {"rope_scaling": DYNAMIC}, {}),
}


@pytest.mark.parametrize("length", [40, 12])
@pytest.mark.parametrize("case", CASES)
def test_reference_equals_the_model_of_transformers(case: str, length: int) -> None:
    architecture, keys, values = CASES[case]
    model, tokens = lively_model(tiny_config(model=keys, heads={"count": 1})), random_tokens(2, length)
    with torch.no_grad():
        expected, found = in_transformers(model, architecture, **values)(tokens).logits, model(tokens)[1]
    assert float(expected.std()) > 0.5, "the logits are not trivial"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
