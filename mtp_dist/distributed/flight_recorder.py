"""PyTorch's flight recorder: the last collectives of each rank, to diagnose a run that hangs."""

import os
import pickle
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

FLIGHT_RECORDER = "flight_recorder"
"""Folder within the run's; its files are rank_00000, rank_00001, ..., as `torchfrtrace` expects them."""
RECORDED_COLLECTIVES = "2000"


def enable_flight_recorder(environment: MutableMapping[str, str] = os.environ) -> None:
    """Record the last collectives of this process. Call it before the first process group opens."""
    environment.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED_COLLECTIVES)


def dump_flight_recorder(path: Path) -> str | None:
    """Write the record of this process and describe its last collective; return None if there is no record."""
    from torch._C import _distributed_c10d as c10d  # late, so that a program starts without waiting for torch

    # NCCL has its own record, in CUDA builds only; the other one is gloo's.
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        dump = getattr(c10d, name, None)
        record: bytes = dump() if dump else pickle.dumps({})
        if entries := pickle.loads(record).get("entries"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record)
            return _describe(entries[-1])
    return None


def _describe(entry: dict[str, Any]) -> str:
    number, label = entry["process_group"]
    group = f"{number} ({label})" if label else number
    return f"{entry['profiling_name']}, number {entry['collective_seq_id']} of group {group}, {entry['state']}"
