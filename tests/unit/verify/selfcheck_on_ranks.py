"""A self-check on every rank of a test."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mtp_dist.config import Config


def selfcheck_of(config: Config, fault: bool) -> list[Any]:
    """fault: the embedding's gradient is accumulated in the precision of the weight."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.model import trunk
    from mtp_dist.verify.selfcheck import selfcheck

    class Lookup:
        @staticmethod
        def apply(weight: Tensor, rows: Tensor) -> Tensor:
            return F.embedding(rows, weight)

    ours = getattr(trunk, "_Lookup", None)
    try:
        trunk._Lookup = Lookup if fault else ours  # type: ignore[assignment,misc]
        return selfcheck(config, initialize_topology(config, select_device(config)))
    finally:
        trunk._Lookup = ours  # type: ignore[assignment,misc]
