"""Selection of the device, the only code that distinguishes machines without a GPU, and its memory statistics."""

import os
import re
import resource
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from mtp_dist.config import Config
from mtp_dist.distributed.determinism import use_deterministic_algorithms
from mtp_dist.distributed.gpus import has_nvidia_gpu
from mtp_dist.errors import LaunchError


def select_device(config: Config) -> torch.device:
    """Return the device of this rank and make it current. Call it before anything imports DeepSpeed.

    Raise LaunchError if `run.device` requires a GPU that PyTorch cannot use, or if `auto` would leave a GPU idle.
    """
    if config.parallel.tensor > 1:
        # One hardware queue keeps the order in which collectives and matmuls are issued, so that they overlap.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if config.train.deterministic:
        use_deterministic_algorithms()
    available = torch.cuda.is_available()
    if config.run.device == "cuda" and not available:
        raise LaunchError(
            "run.device = 'cuda', but PyTorch finds no GPU on this machine: use 'cpu' or 'auto', or install a CUDA "
            "build of PyTorch"
        )
    if config.run.device == "auto" and not available and has_nvidia_gpu():
        build = "is a build for CPUs" if torch.version.cuda is None else "finds none: check nvidia-smi"
        raise LaunchError(
            f"run.device = 'auto', but PyTorch cannot use the NVIDIA GPU of {socket.gethostname()}: torch "
            f"{torch.__version__} {build}. Give the job or the container access to GPUs, or train on the CPU with "
            "run.device = 'cpu'"
        )
    if config.run.device == "cpu" or not available:
        _use_cpu()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.device_count() == 1:
        local_rank = 0  # each task has a GPU of its own; the rendezvous finds ranks that share one
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}: start as many "
            "processes per machine as it has GPUs, or set run.device = 'cpu'"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _use_cpu() -> None:
    # DeepSpeed selects its accelerator at import; Megatron-core allocates on `torch.cuda.current_device()`, which
    # raises without CUDA and may as well return a torch.device.
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.cuda.current_device = partial(torch.device, "cpu")  # type: ignore[assignment]


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process since the last reset, in bytes.

    Allocated memory on a GPU, resident memory on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # some sandboxes lack the file or the line
        if peak := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")):
            return int(peak[1]) * 1024
    # At least the memory of the process that started this one.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # some sandboxes do not have this file; the peak then remains that of the whole process
        Path("/proc/self/clear_refs").write_bytes(b"5")  # see proc_pid_clear_refs(5)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
