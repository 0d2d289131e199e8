"""Refuse, before anything is allocated, a run that this machine's memory cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from mtp_dist.config import Config, DeviceMemory, DeviceType, with_device_memory
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.launcher import local_ranks
from mtp_dist.errors import ConfigError
from mtp_dist.planner.devices import nominal_memory
from mtp_dist.planner.fit import COMPONENTS, Fit, fit, remedies
from mtp_dist.planner.layouts import overrides
from mtp_dist.planner.memory import USABLE_FRACTION, step_token_bytes

if TYPE_CHECKING:
    from mtp_dist.distributed.topology import Topology


def check_memory(config: Config, device: torch.device) -> Config:
    """Return the configuration with the memory of this rank's device, which bounds the split of the layers.

    Raise ConfigError if a rank of the pipeline, or the samples of one step, need more than that. If all ranks are on
    one machine whose memory they share, they may need different amounts of it, and no split needs less than another.
    The estimate leaves out what the libraries need, so a run that passes may still run out of memory.
    """
    if not config.parallel.check_memory:
        return config
    device_type: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    per_node = local_ranks() or 1
    host = psutil.virtual_memory().total // per_node
    shared = device_type == "cpu" and per_node == config.world_size
    if config.device_memory is None and not shared:
        config = with_device_memory(config, DeviceMemory(device_type, _device_bytes(device, host)))
    memory = config.device_memory.bytes if config.device_memory else host
    found = fit(config, device_type)
    if (found.mean_bytes if shared else found.binding.memory.total) > memory:
        raise ConfigError(_too_large(found, device, memory, per_node, shared))
    if (tokens := step_token_bytes(config)) > host:
        raise ConfigError(
            f"train.global_batch_size = {config.train.global_batch_size} gives each data-parallel rank "
            f"{_gigabytes(tokens)} of token ids per step, which does not fit into {_gigabytes(host)} of memory: "
            "lower it or train.sequence_length"
        )
    return config


def agree_on_memory(config: Config, topology: Topology) -> Config:
    """Return the configuration with the smallest memory of all ranks' devices, so that all split the layers alike.

    A collective over all ranks.
    """
    # Here, because the checks at the start import this module before Megatron-core's import is silenced.
    from mtp_dist.distributed.collectives import all_gather_floats

    memory = config.device_memory
    if memory is None:
        return config
    smallest = min(size for [size] in all_gather_floats([memory.bytes], topology))
    return with_device_memory(config, memory._replace(bytes=smallest))


def _device_bytes(device: torch.device, host: int) -> float:
    if device.type != "cuda":
        return host
    return nominal_memory(device_name(device), torch.cuda.get_device_properties(device).total_memory)


def _too_large(found: Fit, device: torch.device, memory: float, per_node: int, shared: bool) -> str:
    config, binding = found.config, found.binding
    largest = binding.largest_component
    options = remedies(config, USABLE_FRACTION * memory, found.device, per_node, shared)
    ranks = per_node if shared else 1
    advice = [f"{overrides(changes)} ({_gigabytes(ranks * size)})" for changes, size in options]
    hardware = "GPUs" if device.type == "cuda" else "machines"
    remedy = f"use {' or '.join(advice)}" if advice else f"use more {hardware} or a smaller model"
    component = f"{_gigabytes(getattr(binding.memory, largest))} are {COMPONENTS[largest]}"
    if shared:
        needed = f"the {ranks} ranks need {_gigabytes(ranks * found.mean_bytes)} together"
        most = f" at position {binding.rank} of the pipeline" if config.parallel.pipeline > 1 else ""
        available = f"the machine has {_gigabytes(ranks * memory)} of memory"
        component = f"of which {component} on each of them" + most
    else:
        needed = f"the ranks at position {binding.rank} of the pipeline need {_gigabytes(binding.memory.total)}"
        available = f"{device_name(device)} has {_gigabytes(memory)} of memory per rank"
        component = f"of which {component}"
    return (
        f"with parallel.tensor = {config.parallel.tensor} and parallel.pipeline = {config.parallel.pipeline} {needed}, "
        f"{component}, but {available}: {remedy}. parallel.check_memory=false starts the run anyway"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
