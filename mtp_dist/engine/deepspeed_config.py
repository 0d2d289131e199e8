"""The DeepSpeed configuration that follows from ours."""

import sys
from typing import Any

from mtp_dist.config import Config

REDUCE_BUCKET = 50_000_000
"""Elements of one gradient reduction; DeepSpeed's default of 500 million allocates 2 GB for the smallest model."""


def deepspeed_config(config: Config, micro_batches: int) -> dict[str, Any]:
    """The JSON that `deepspeed.initialize` reads. The keys of the `deepspeed` section are added as they are."""
    bf16 = config.train.precision == "bf16"
    # DeepSpeed has no stage-0 optimizer that accumulates bf16 gradients in fp32: its BF16_Optimizer, which shards the
    # optimizer state over the data-parallel ranks, asks for stage 1.
    zero_stage = 1 if bf16 else config.parallel.zero_stage
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        # DeepSpeed reads 0 as "no norm either"; an infinite bound measures the norm and never clips.
        "gradient_clipping": config.train.grad_clip or float("inf"),
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Without it DeepSpeed rounds the accumulated gradients to bf16, sums them so and copies them back, also with
        # one data-parallel rank.
        "communication_data_type": config.parallel.grad_reduce_dtype,
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": REDUCE_BUCKET},
        "zero_allow_untested_optimizer": True,
        # Their default, True, cuts activations over the tensor-parallel ranks as if all held the same: silently wrong
        # under sequence parallelism.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
        "steps_per_print": sys.maxsize,
        **config.deepspeed,
    }
