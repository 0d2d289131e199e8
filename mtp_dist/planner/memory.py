"""The least memory that a run needs, whatever its activations."""

from mtp_dist.config import Config
from mtp_dist.planner.flops import parameter_counts

BYTES_PER_ID = 8
"""Token ids are int64 from the reader on."""


def least_parameter_bytes(config: Config) -> int:
    """Bytes of weights, gradients and optimizer state on the average rank of a stage.

    fp32: 4 for the weight, 4 for its gradient, 8 for Adam's moments. bf16: 2 for the weight, 4 for the accumulated
    gradient, 12 for the master weight and the moments, which bf16 always shards over the data-parallel ranks.
    """
    bf16 = config.train.precision == "bf16"
    sharded = bf16 or config.parallel.zero_stage
    shards = config.dp_size if sharded else 1
    per_parameter = (6 if bf16 else 8) + (12 if bf16 else 8) / shards
    ranks = config.parallel.tensor * config.parallel.pipeline
    return int(parameter_counts(config).total / ranks * per_parameter)


def step_token_bytes(config: Config) -> int:
    """Bytes of the samples of one step that one data-parallel rank reads."""
    samples = config.train.global_batch_size // config.dp_size
    return samples * (config.train.sequence_length + config.heads.lookahead) * BYTES_PER_ID
