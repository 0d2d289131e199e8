"""Which device computes; the only place that knows about machines without a GPU."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import torch

from mtp_dist.config import Config
from mtp_dist.distributed.determinism import use_deterministic_algorithms
from mtp_dist.distributed.gpus import has_nvidia_gpu
from mtp_dist.errors import ConfigError


def select_device(config: Config) -> torch.device:
    """The device of this rank, made current. To be called before anything imports DeepSpeed.

    Raise ConfigError if `run.device` asks for a GPU that PyTorch cannot use, or if `auto` would leave one idle.
    """
    if config.parallel.tensor > 1:
        # One hardware queue keeps the order in which collectives and matmuls are issued, so that they overlap.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if config.train.deterministic:
        use_deterministic_algorithms()
    available = torch.cuda.is_available()
    if config.run.device == "cuda" and not available:
        raise ConfigError(
            "run.device = 'cuda', but PyTorch sees no GPU on this machine: use 'cpu' or 'auto', or install a CUDA "
            "build of PyTorch"
        )
    if config.run.device == "auto" and not available and has_nvidia_gpu():
        build = "is a build for CPUs" if torch.version.cuda is None else "sees none: look at nvidia-smi"
        raise ConfigError(
            f"run.device = 'auto', but PyTorch cannot use the NVIDIA GPU of {socket.gethostname()}: torch "
            f"{torch.__version__} {build}. Let the job or the container have GPUs, or train on the CPU with "
            "run.device = 'cpu'"
        )
    if config.run.device == "cpu" or not available:
        _use_cpu()
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.device_count() == 1:
        local_rank = 0  # each task sees a GPU of its own; ranks that share one are found where they meet
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}: start as many "
            "processes a machine as it has GPUs, or set run.device = 'cpu'"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _use_cpu() -> None:
    # DeepSpeed picks its accelerator at import; Megatron-core allocates on `torch.cuda.current_device()`, which
    # raises without CUDA and may as well be a torch.device.
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def peak_memory(device: torch.device) -> int:
    """Return the largest memory of this process since the last reset, in bytes.

    Allocated on the GPU, resident in RAM on the CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Forget the largest memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # some sandboxes do not have this file: there it stays the largest so far
        Path("/proc/self/clear_refs").write_bytes(b"5")  # see proc_pid_clear_refs(5)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
