"""Exports for transformers, by the kinds of heads that it drafts with or the export's own code does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.model.reference import ReferenceModel
from tests.tiny import BLOCKS, LLAMA3_ROPE
from tests.unit.convert.folders import write_model

Heads = dict[str, Any]
CUSTOM: dict[str, Heads] = {
    "parallel": {},
    "two layers per head": {"layers_per_head": 2},
    "no layers": {"layers_per_head": 0, "unembedding": "separate"},
    "causal": {"kind": "causal"},
    "anticausal": {"kind": "anticausal", "count": 3, "layers_per_head": 2},
    "linear": {"kind": "linear"},
    "mlp, separate": {"kind": "mlp", "unembedding": "separate"},
    "leaps": {"prediction_distances": [1, 3, 5, 8]},
    "weighted, conditioned": {"kind": "mlp", "weighted_hidden_states": True, "condition": "previous_token"},
    "weighted": {"weighted_hidden_states": True},
    "conditioned": {"kind": "linear", "condition": "previous_token", "prediction_distances": [1, 3, 4, 6]},
    "sequential, two layers": {"kind": "sequential", "layers_per_head": 2, "count": 5},
    "repeated, two layers": {"kind": "sequential", "layers_per_head": 2, "repeated": True},
    "sequential, separate": {"kind": "sequential", "unembedding": "separate", "count": 3},
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 62}
TRUNKS: dict[str, tuple[Heads, dict[str, Any]]] = {
    "Llama, biases": ({"kind": "anticausal"}, {"linear_bias": True}),
    "Qwen2": ({"layers_per_head": 2}, {"qkv_bias": True}),
    "Llama, dynamic": ({"kind": "sequential"}, {"rope_theta": 500.0, "rope_scaling": DYNAMIC}),
    "Qwen3": ({"kind": "sequential"}, {"qk_norm": True, "kv_channels": 12}),
    "Mistral, window": ({"kind": "causal"}, {"sliding_window": 7}),
    "Qwen2, window, linear": ({"kind": "linear"}, {"qkv_bias": True, "sliding_window": 16}),
    "GPT-NeoX": ({"kind": "sequential"}, BLOCKS["neox"]),
    "GPT-NeoX, linear": ({"kind": "linear"}, BLOCKS["neox"] | {"parallel_residual": False, "tie_embeddings": True}),
}
"""Heads and building blocks of other trunks, with whose heads the export's own code drafts."""
NATIVE: dict[str, tuple[Heads, dict[str, Any]]] = {
    "sequential": ({"kind": "sequential", "token_order": 0.1}, {}),
    "two heads": ({"kind": "sequential", "count": 2}, {}),
    "repeated, tied": ({"kind": "sequential", "repeated": True}, {"tie_embeddings": True}),
}
"""Heads that transformers itself drafts with, and the section `model`."""


def export(folder: Path, heads: Heads, model: dict[str, Any] | None = None) -> tuple[ReferenceModel, Any]:
    """Export a model with lively weights for transformers. Return it, and what transformers opens."""
    model = {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE} | (model or {})
    reference = write_model(folder / "c", heads=heads, model=model, train={"sequence_length": 64})
    export_checkpoint(folder / "c", folder / "hf", "fp32", engine="transformers")
    return reference, AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True)


@contextmanager
def forward_passes(llama: Any) -> Iterator[list[int]]:
    """Count the model's forward passes."""
    passes = [0]
    hook = llama.register_forward_hook(lambda *rest: passes.__setitem__(0, passes[0] + 1))
    yield passes
    hook.remove()
