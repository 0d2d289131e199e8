"""Refuse, before anything is allocated, a run that this machine's memory cannot hold."""

import psutil
import torch

from mtp_dist.config import Config
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.launcher import local_ranks
from mtp_dist.errors import ConfigError
from mtp_dist.planner.fit import COMPONENTS, DeviceType, PipelineRank, fit, remedies
from mtp_dist.planner.layouts import Changes, overrides
from mtp_dist.planner.memory import step_token_bytes
from mtp_dist.planner.stage_times import USABLE_FRACTION


def check_memory(config: Config, device: torch.device) -> None:
    """Raise ConfigError if a rank of the pipeline, or the samples of one step, need more than this rank's memory.

    If all ranks are on this machine and share its memory, they may need different amounts of it.
    The estimate leaves out what the libraries need, so a run that passes may still run out of memory.
    """
    if not config.parallel.check_memory:
        return
    device_type: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    per_node = local_ranks() or 1
    host = psutil.virtual_memory().total // per_node
    memory = torch.cuda.get_device_properties(device).total_memory if device_type == "cuda" else host
    found = fit(config, device_type)
    needed: float = found.binding.memory.total
    if device_type == "cpu" and per_node == config.world_size:
        needed = sum(rank.memory.total for rank in found.ranks) / config.parallel.pipeline
    if needed > memory:
        options = remedies(config, USABLE_FRACTION * memory, device_type, per_node)
        raise ConfigError(_too_large(config, found.binding, options, device, memory))
    if (tokens := step_token_bytes(config)) > host:
        raise ConfigError(
            f"train.global_batch_size = {config.train.global_batch_size} gives each data-parallel rank "
            f"{_gigabytes(tokens)} of token ids per step, which does not fit into {_gigabytes(host)} of memory: "
            "lower it or train.sequence_length"
        )


def _too_large(
    config: Config, binding: PipelineRank, options: list[tuple[Changes, int]], device: torch.device, memory: int
) -> str:
    largest = binding.largest_component
    advice = [f"{overrides(changes)} ({_gigabytes(needed)})" for changes, needed in options]
    remedy = f"use {' or '.join(advice)}" if advice else "start more ranks or make the model smaller"
    return (
        f"with parallel.tensor = {config.parallel.tensor} and parallel.pipeline = {config.parallel.pipeline} the ranks "
        f"at position {binding.rank} of the pipeline need {_gigabytes(binding.memory.total)}, of which "
        f"{_gigabytes(getattr(binding.memory, largest))} are {COMPONENTS[largest]}, but {device_name(device)} has "
        f"{_gigabytes(memory)} of memory per rank: {remedy}. parallel.check_memory=false starts the run anyway"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
