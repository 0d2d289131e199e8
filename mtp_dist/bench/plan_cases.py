"""Small configurations of every kind whose predicted memory is compared with the measured one."""

from collections.abc import Mapping
from typing import Any

Sections = Mapping[str, Mapping[str, Any]]

BASE: Sections = {
    "run": {"device": "cpu"},
    "model": {
        "hidden_size": 64,
        "trunk_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 176,
        "vocab_size": 1024,
    },
    "heads": {"count": 3},
    "data": {"train": [{"path": "python-stdlib"}]},
    "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 128},
}
"""Three parallel heads in bf16 on one rank; activations, weights and logits are of similar size."""

_FP32 = {"precision": "fp32"}
_NEOX = {"normalization": "layernorm", "mlp": "gelu", "linear_bias": True, "num_query_groups": 4}
_NEOX |= {"parallel_residual": True, "rotary_percent": 0.5}
CASES: dict[str, tuple[int, Sections]] = {
    "parallel": (1, {}),
    "parallel, fp32": (1, {"train": _FP32}),
    "causal": (1, {"heads": {"kind": "causal"}}),
    "anticausal, fp32": (1, {"heads": {"kind": "anticausal"}, "train": _FP32}),
    "linear, fp32": (1, {"heads": {"kind": "linear"}, "train": _FP32}),
    "mlp": (1, {"heads": {"kind": "mlp"}}),
    "sequential": (1, {"heads": {"kind": "sequential"}}),
    "repeated block, fp32": (1, {"heads": {"kind": "sequential", "repeated": True}, "train": _FP32}),
    "separate unembeddings": (1, {"heads": {"unembedding": "separate"}}),
    "selective checkpointing": (1, {"train": {"activation_checkpointing": "selective"}}),
    "full checkpointing, fp32": (1, {"train": {"activation_checkpointing": "full", **_FP32}}),
    "recompute, fp32": (1, {"heads": {"loss_mode": "recompute"}, "train": _FP32}),
    "naive": (1, {"heads": {"loss_mode": "naive"}}),
    "naive, fp32": (1, {"heads": {"loss_mode": "naive"}, "train": _FP32}),
    "frozen trunk": (1, {"train": {"freeze": ["trunk"]}}),
    "low-rank adapters": (1, {"train": {"low_rank": {"rank": 4}}}),
    "weighted hidden states": (1, {"heads": {"weighted_hidden_states": True}}),
    "condition, fp32": (1, {"heads": {"condition": "previous_token"}, "train": _FP32}),
    "distillation, fp32": (1, {"heads": {"distillation": 0.5, "total_variation": 0.1}, "train": _FP32}),
    "token order": (1, {"heads": {"token_order": 0.5}}),
    "separate documents": (1, {"data": {"attention_across_documents": False}}),
    "chunks of 64 tokens": (1, {"heads": {"chunk_tokens": 64}}),
    "blocks of Qwen2, fp32": (1, {"model": {"qkv_bias": True}, "train": _FP32}),
    "blocks of GPT-NeoX": (1, {"model": _NEOX}),
    "window of 32 positions, fp32": (1, {"model": {"sliding_window": 32}, "train": _FP32}),
    "tensor 2, fp32": (2, {"parallel": {"tensor": 2}, "train": _FP32}),
    "tensor 2, sequence": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "blocks of Qwen3, tensor 2, sequence": (
        2,
        {"parallel": {"tensor": 2, "sequence": True}, "model": {"qk_norm": True, "kv_channels": 24}},
    ),
    "data 2": (2, {}),
    "data 2, ZeRO 1, fp32": (2, {"parallel": {"zero_stage": 1}, "train": _FP32}),
    "data 4": (4, {}),
    "data 4, ZeRO 1, fp32": (4, {"parallel": {"zero_stage": 1}, "train": _FP32}),
    "pipeline 2, tied, fp32": (2, {"parallel": {"pipeline": 2}, "model": {"tie_embeddings": True}, "train": _FP32}),
    "pipeline 2, full checkpointing": (
        2,
        {"parallel": {"pipeline": 2}, "train": {"activation_checkpointing": "full"}},
    ),
    "pipeline 2, weighted hidden states": (
        2,
        {"parallel": {"pipeline": 2}, "heads": {"weighted_hidden_states": True}},
    ),
    "pipeline 4": (4, {"parallel": {"pipeline": 4, "partition": [1, 1, 1, 1]}}),
    "pipeline 2, data 2, ZeRO 1, fp32": (4, {"parallel": {"pipeline": 2, "zero_stage": 1}, "train": _FP32}),
    "pipeline 2, heads on both, fp32": (
        2,
        {"parallel": {"pipeline": 2, "partition": [4, 0]}, "heads": {"stages": 2}, "train": _FP32},
    ),
    "pipeline 4, heads on two": (
        4,
        {"parallel": {"pipeline": 4, "partition": [2, 1, 1, 0]}, "heads": {"stages": 2}},
    ),
    "pipeline 2, DualPipeV, fp32": (
        2,
        {"parallel": {"pipeline": 2, "schedule": "dualpipev", "partition": [2, 1, 1, 0]}, "train": _FP32},
    ),
    "pipeline 4, DualPipeV": (
        4,
        {
            "parallel": {"pipeline": 4, "schedule": "dualpipev"},
            "model": {"trunk_layers": 8},
            "train": {"global_batch_size": 16},
        },
    ),
    "tensor 2, pipeline 2, sequence": (4, {"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}}),
}
"""Number of ranks and sections of each case, in addition to BASE."""


def merge_sections(base: Sections, sections: Sections) -> dict[str, Any]:
    """Return the sections of a case in addition to those of its base."""
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in dict.fromkeys((*base, *sections))}
