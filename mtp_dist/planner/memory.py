"""Minimum memory of a run, without its activations."""

from mtp_dist.config import Config
from mtp_dist.planner.flops import parameter_counts, trained_parameters

BYTES_PER_TOKEN = 8
"""Size of an int64 token id."""


def min_parameter_bytes(config: Config) -> int:
    """Return the bytes of parameters, gradients and optimizer state on the average rank.

    Per parameter in fp32: 4 bytes, 4 for its gradient, 8 for Adam's moments. In bf16: 2 bytes, 4 for the accumulated
    gradient, 12 for master weight and moments, which bf16 always shards over the data-parallel ranks. A frozen
    parameter has its own bytes only.
    """
    bf16 = config.train.precision == "bf16"
    shards = config.dp_size if bf16 or config.parallel.zero_stage else 1
    own, gradient, sharded = (2, 4, 12 / shards) if bf16 else (4, 4, 8 / shards)
    total = parameter_counts(config).total * own + trained_parameters(config) * (gradient + sharded)
    return int(total / (config.parallel.tensor * config.parallel.pipeline))


def step_token_bytes(config: Config) -> int:
    """Return the bytes of one step's samples on one data-parallel rank."""
    samples = config.train.global_batch_size // config.dp_size
    return samples * (config.train.sequence_length + config.heads.lookahead) * BYTES_PER_TOKEN
