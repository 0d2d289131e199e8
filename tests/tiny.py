"""A tiny model for the tests."""

import os
from pathlib import Path
from typing import Any

import yaml

from mtp_dist.config import Config, build_config, load_config, resolve
from mtp_dist.data.build_tokenizer import build_tokenizer

VOCAB_SIZE = 131
"""Odd on purpose: every tensor-parallel degree needs padding."""

LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}
"""With the tiny model's wavelengths, 6, 63, 628 and 6283 positions, the first stays and the second is between."""

BLOCKS: dict[str, dict[str, Any]] = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "kv_channels": 12},
    "neox": {
        "num_query_groups": 4,
        "linear_bias": True,
        "normalization": "layernorm",
        "mlp": "gelu",
        "parallel_residual": True,
        "rotary_percent": 0.5,
    },
    "mistral": {"sliding_window": 5},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 2.0}
    },
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}},
}
"""Section `model` of a tiny model with the building blocks of each architecture."""


TINY = yaml.safe_load("""
run: {device: cpu}
model: {hidden_size: 32, trunk_layers: 4, num_attention_heads: 4, num_query_groups: 2, ffn_hidden_size: 48}
heads: {count: 4}
data: {train: [{path: python-stdlib}]}
train: {steps: 20, global_batch_size: 8, micro_batch_size: 2, sequence_length: 16, precision: fp32}
optimizer: {lr: 0.001, warmup_steps: 4}
""")


def tiny_config(world_size: int | None = None, **sections: dict[str, Any]) -> Config:
    """Return a model with everything that can go wrong in it, small enough for dozens of runs.

    world_size: that of one data-parallel rank by default.
    """
    values = {name: {**section} for name, section in TINY.items()}
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    config = build_config(values)
    return at_world_size(config, world_size or config.parallel.tensor * config.parallel.pipeline)


def at_world_size(config: Config, world_size: int) -> Config:
    """Return the configuration resolved for that many ranks, with VOCAB_SIZE tokens if it names no other number."""
    return resolve(config, config.model.vocab_size or VOCAB_SIZE, world_size)


def load_resolved(path: Path) -> Config:
    """Return the configuration of a file, resolved for its tokenizer and the ranks of this job."""
    config = load_config(path)
    return resolve(config, build_tokenizer(config.data.tokenizer).vocab_size, int(os.environ.get("WORLD_SIZE", 1)))
