"""A self-check on every rank of a test."""

from types import SimpleNamespace

import pytest
import torch.nn.functional as F


def selfcheck_of(config, fault):
    """fault: the embedding's gradient is accumulated in the precision of the weight."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology
    from mtp_dist.model import trunk
    from mtp_dist.verify.selfcheck import selfcheck

    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(trunk, "_Lookup", SimpleNamespace(apply=lambda weight, rows: F.embedding(rows, weight)))
        return selfcheck(config, initialize_topology(config, select_device(config)))
