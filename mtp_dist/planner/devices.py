"""Accelerators by their data sheets, and the rates that a training reaches on them: assumed, or measured."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mtp_dist.errors import LaunchError

SLOWER_VARIANTS = {"nvl", "mig", "laptop", "d"}
"""Words of the names of slower variants, which have no entry."""
MATMUL_FRACTION = 0.7
"""Assumed fraction of the peak that the product of two large matrices reaches."""
LAYER_FRACTION = 0.75
"""Assumed fraction of the rate of large products that a layer reaches: attention, norms and activation functions take
time, but count little or no FLOPs."""
BANDWIDTH_FRACTION = 0.8
"""Assumed fraction of memory, link and network bandwidth that large transfers reach."""


@dataclass(frozen=True)
class Accelerator:
    """A type of accelerator in its usual node, with the figures of the data sheets that `source` names."""

    name: str
    """Name in `mtp-dist plan --gpu`."""
    label: str
    words: frozenset[str]
    """Words of the driver's name for it, of those that distinguish accelerators."""
    bf16_flops: float
    """Dense FLOP/s of matrix products in bf16: half of the figures "with sparsity"."""
    fp32_flops: float
    """FLOP/s in fp32, without TF32."""
    memory_bytes: float
    """The data sheet's memory, 1e9 bytes per GB. Drivers report up to 7% more, which is left to the CUDA context, NCCL
    and fragmentation."""
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second in one direction, from one accelerator to the others of its node."""
    per_node: int
    """Accelerators per node."""
    network_bandwidth: float
    """Bytes per second in one direction, from one accelerator to other nodes."""
    source: str

    def peak_flops(self, precision: str) -> float:
        """Return the peak FLOP/s in the precision of a run."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


@cache
def accelerators() -> dict[str, Accelerator]:
    """Return every known accelerator by its name."""
    rows = json.loads(Path(__file__).with_name("accelerators.json").read_text(encoding="utf-8"))
    return {row["name"]: Accelerator(**row | {"words": frozenset(row["words"])}) for row in rows}


def find_accelerator(name: str) -> Accelerator:
    """Return the accelerator of a name, such as h100. Raise LaunchError if it is not known."""
    if found := accelerators().get(name.lower()):
        return found
    raise LaunchError(f"--gpu = '{name}' is not a known accelerator: choose one of {', '.join(accelerators())}")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the dense matrix FLOP/s of a GPU by the name from `torch.cuda.get_device_name`; None if unknown.

    Only `bf16` has peaks: that of fp32 depends on whether the run allows TF32. A variant without an entry of its own,
    such as one for laptops, has no peak.
    """
    accelerator = recognize_accelerator(device_name)
    return accelerator.bf16_flops if accelerator and precision == "bf16" else None


def recognize_accelerator(device_name: str) -> Accelerator | None:
    """Return the accelerator with the driver's name for it; None if it is not known."""
    distinguishing = frozenset().union(*(each.words for each in accelerators().values()), SLOWER_VARIANTS)
    words = distinguishing.intersection(re.findall(r"[a-z0-9]+", device_name.lower()))
    return next((each for each in accelerators().values() if words and each.words == words), None)


def nominal_memory(device_name: str, memory_bytes: int) -> float:
    """Return the data sheet's memory of a GPU whose driver reports up to 10% more; `memory_bytes` of any other."""
    accelerator = recognize_accelerator(device_name)
    if accelerator and accelerator.memory_bytes <= memory_bytes <= 1.1 * accelerator.memory_bytes:
        return accelerator.memory_bytes
    return memory_bytes


@dataclass(frozen=True)
class Rates:
    """The rates of a type of accelerator that large operations reach."""

    matmul: float
    """FLOP/s of the product of two large matrices in the run's precision."""
    memory: float
    """Bytes per second that are read or written."""
    link: float
    """Bytes per second between accelerators of a node."""
    network: float
    """Bytes per second and accelerator between nodes."""


def assumed_rates(accelerator: Accelerator, precision: str) -> Rates:
    """Return the assumed fractions of the data sheet's figures."""
    return Rates(
        matmul=MATMUL_FRACTION * accelerator.peak_flops(precision),
        memory=BANDWIDTH_FRACTION * accelerator.memory_bandwidth,
        link=BANDWIDTH_FRACTION * accelerator.link_bandwidth,
        network=BANDWIDTH_FRACTION * accelerator.network_bandwidth,
    )
