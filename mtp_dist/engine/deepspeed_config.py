"""The DeepSpeed configuration that follows from the run's."""

import sys
from typing import Any

from mtp_dist.config import Config
from mtp_dist.planner.memory import reduce_bucket


def deepspeed_config(config: Config, micro_batches: int, trained: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, with the keys of the `deepspeed` section.

    trained: elements of this rank's trained parameters.
    """
    bf16 = config.train.precision == "bf16"
    # DeepSpeed has no stage-0 optimizer that accumulates bf16 gradients in fp32: its BF16_Optimizer, which shards the
    # optimizer state over the data-parallel ranks, requires stage 1.
    zero_stage = 1 if bf16 else config.parallel.zero_stage
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        # With 0 DeepSpeed does not compute the norm either; an infinite bound computes it and never clips.
        "gradient_clipping": config.train.grad_clip or float("inf"),
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        # Without it DeepSpeed rounds the accumulated gradients to bf16 and sums those, even with one data-parallel
        # rank.
        "communication_data_type": config.parallel.grad_reduce_dtype,
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": reduce_bucket(trained)},
        "zero_allow_untested_optimizer": True,
        # The default, True, shards activations over the tensor-parallel ranks as if all had the same: silently wrong
        # under sequence parallelism.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
        "steps_per_print": sys.maxsize,
        **config.deepspeed,
    }
