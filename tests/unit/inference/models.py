"""Tiny models of every kind for the tests of decoding."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from mtp_dist.config import Config
from mtp_dist.inference.configuration import generation_model_config
from mtp_dist.inference.loading import model_weights
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.model.parameters import STATE_WEIGHTS
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import LINEAR_ROPE, LLAMA3_ROPE, tiny_config

VOCAB_SIZE = 50
END = VOCAB_SIZE - 1
VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {"kind": "parallel"},
    "causal": {"kind": "causal"},
    "anticausal": {"kind": "anticausal", "layers_per_head": 2},
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp"},
    "sequential": {"kind": "sequential", "layers_per_head": 2},
    "repeated": {"kind": "sequential", "repeated": True},
    "separate": {"kind": "parallel", "unembedding": "separate"},
    "no_layers": {"kind": "parallel", "layers_per_head": 0, "unembedding": "separate"},
    "weighted": {"kind": "parallel", "weighted_hidden_states": True},
    "leap": {"kind": "parallel", "prediction_distances": [1, 3, 5, 7]},
    "conditioned": {"kind": "mlp", "condition": "previous_token"},
    "conditioned_leap": {
        "condition": "previous_token",
        "condition_rank": 6,
        "prediction_distances": [1, 3, 4, 7],
        "unembedding": "separate",
    },
    "anticausal_leap": {"kind": "anticausal", "prediction_distances": [1, 3, 4, 7]},
}
"""The section `heads` of each variant, with four heads unless it has another number."""
NEOX: dict[str, Any] = {
    "normalization": "layernorm",
    "mlp": "gelu",
    "linear_bias": True,
    "num_query_groups": 4,
    "rotary_percent": 0.5,
}
NEOX |= {"parallel_residual": True}
TRUNKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied, llama3": ("parallel", {"tie_embeddings": True, "rope_scaling": LLAMA3_ROPE}),
    "tied, one group": ("sequential", {"tie_embeddings": True, "num_query_groups": 1}),
    "linear, all groups": ("causal", {"rope_scaling": LINEAR_ROPE, "num_query_groups": 4}),
    "Mistral": ("mlp", {"sliding_window": 3}),
    "Qwen2": ("sequential", {"qkv_bias": True, "sliding_window": 4}),
    "Qwen3": ("parallel", {"qk_norm": True, "kv_channels": 12}),
    "GPT-NeoX": ("sequential", NEOX),
    "GPT-NeoX, linear": ("linear", NEOX),
}
"""The variant of the heads and keys of the section `model` of other trunks."""


class TinyModel(NamedTuple):
    config: Config
    reference: ReferenceModel
    model: MTPForCausalLM


def tiny_model(variant: str, init_std: float = 0.1, vocab_size: int = VOCAB_SIZE, heads: int = 4) -> TinyModel:
    """Return a model with random weights, the gains of the norms included, and its reference."""
    variant, trunk = TRUNKS.get(variant, (variant, {}))
    model = {"init_std": init_std, "vocab_size": vocab_size, **trunk}
    config = tiny_config(heads={"count": heads, **VARIANTS[variant]}, model=model, train={"sequence_length": 96})
    reference = ReferenceModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in reference.named_weights().items():
            if name.endswith("norm.weight"):
                weight.mul_(0.5 + torch.rand(weight.shape, generator=generator))
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.3, generator=generator)
            elif name.startswith("condition."):
                weight.normal_(0.0, 0.5, generator=generator)
            elif name == STATE_WEIGHTS:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return TinyModel(config, reference, open_weights(config, reference.named_weights()))


def open_weights(config: Config, weights: dict[str, Tensor]) -> MTPForCausalLM:
    end = config.vocab_size - 1
    model: MTPForCausalLM = MTPForCausalLM.from_pretrained(
        None,
        config=generation_model_config(config, end, "fp32"),
        state_dict=dict(model_weights(config, weights.items())),
    )
    model.generation_config = GenerationConfig(pad_token_id=end)
    return model.eval()


def padded_prompts(lengths: list[int], seed: int = 0, vocab_size: int = VOCAB_SIZE) -> tuple[Tensor, Tensor]:
    """Return random prompts of these lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    tokens = torch.randint(vocab_size - 1, (len(lengths), longest), generator=generator)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    return tokens * mask + (vocab_size - 1) * (1 - mask), mask
