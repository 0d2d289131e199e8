"""Refuse, before anything is allocated, a run that this machine's memory cannot hold."""

import psutil
import torch

from mtp_dist.config import Config
from mtp_dist.distributed.launcher import local_ranks
from mtp_dist.errors import ConfigError
from mtp_dist.planner.flops import parameter_counts
from mtp_dist.planner.memory import rank_memory, step_token_bytes
from mtp_dist.planner.partition import trunk_layers_per_stage


def check_memory(config: Config, device: torch.device) -> None:
    """Raise ConfigError if this rank's parameters, or the samples of one step, are larger than its memory.

    Only the minimum is counted, so a run that passes may still run out of memory.
    """
    host = psutil.virtual_memory().total // (local_ranks() or 1)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host
    states = [
        rank_memory(config, stage, layers, in_flight=1).state
        for stage, layers in enumerate(trunk_layers_per_stage(config))
    ]
    parallel = config.parallel
    rank_states = (sum(states[stage] for stage in parallel.rank_stages(rank)) for rank in range(parallel.pipeline))
    if (needed := max(rank_states)) > memory:
        total = parameter_counts(config).total
        raise ConfigError(
            f"the model has {total:,} parameters; with parallel.tensor = {config.parallel.tensor} and "
            f"parallel.pipeline = {config.parallel.pipeline} a rank needs {_gigabytes(needed)} for its shard and the "
            f"optimizer, but has {_gigabytes(memory)} of memory: raise one of the two, or make the model smaller"
        )
    if (needed := step_token_bytes(config)) > host:
        raise ConfigError(
            f"train.global_batch_size = {config.train.global_batch_size} gives each data-parallel rank "
            f"{_gigabytes(needed)} of token ids per step, which does not fit into {_gigabytes(host)} of memory: "
            "lower it or train.sequence_length"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
