"""Comparison of the ranks of a run: device, configuration and versions must agree, GPUs must differ."""

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256

import torch

from mtp_dist.config import Config
from mtp_dist.versions import installed_versions

MAX_LISTED = 16
REMEDIES = {
    "device": "check nvidia-smi there, or set run.device",
    "configuration": "start every rank with the same file and the same overrides",
    "version of torch": "all nodes need the same environment",
    "version of NCCL": "all nodes need the same environment",
    "version of deepspeed": "all nodes need the same environment",
    "version of megatron-core": "all nodes need the same environment",
    "version of mtp-dist": "all nodes need the same environment",
}
"""Properties that must be equal on all ranks, each with the remedy if they differ."""


def describe_rank(config: Config, device: torch.device) -> dict[str, str]:
    """Return the properties of this rank that the rendezvous compares."""
    description = {
        "host": socket.gethostname(),
        "device": device.type,
        # Hashed, because thousands of configurations would fill the store.
        "configuration": sha256(config.model_dump_json().encode()).hexdigest()[:12],
        "version of NCCL": str(torch.cuda.nccl.version()) if device.type == "cuda" else "",
    }
    description |= {f"version of {name}": number or "not installed" for name, number in installed_versions().items()}
    if device.type == "cuda":
        description["gpu"] = str(torch.cuda.get_device_properties(device).uuid)
    return description


def find_differences(ranks: Sequence[Mapping[str, str]]) -> str | None:
    """Return a message, one line per difference, that names the ranks that deviate from the majority."""
    lines = []
    device_differs = len({rank["device"] for rank in ranks}) > 1
    for name, remedy in REMEDIES.items():
        values = [rank[name] for rank in ranks]
        usual, count = Counter(values).most_common(1)[0]
        # Only ranks on GPUs have NCCL.
        if count == len(ranks) or (name == "version of NCCL" and device_differs):
            continue
        for value in sorted(set(values) - {usual}):
            deviating = [number for number, other in enumerate(values) if other == value]
            where = list_ranks(deviating, ranks)
            lines.append(f"the {name} is {value} on {where}, and {usual} on {count} other ranks: {remedy}")
    gpus = Counter(rank["gpu"] for rank in ranks if "gpu" in rank)
    for gpu in (gpu for gpu, count in gpus.items() if count > 1):
        sharing = [number for number, rank in enumerate(ranks) if rank.get("gpu") == gpu]
        lines.append(f"{list_ranks(sharing, ranks)} have the same GPU: start as many ranks per node as it has GPUs")
    return "\n".join(lines) or None


def list_ranks(numbers: Sequence[int], ranks: Sequence[Mapping[str, str]]) -> str:
    """Return the first MAX_LISTED ranks with their hosts, as text."""
    shown = ", ".join(f"rank {number} ({ranks[number]['host']})" for number in numbers[:MAX_LISTED])
    return shown if len(numbers) <= MAX_LISTED else f"{shown} and {len(numbers) - MAX_LISTED} more"
