"""The preflight on every rank, with stand-ins for the matmuls: a busy machine would name any rank."""

import pytest

from mtp_dist.config import Config

SLOWED = 2


def preflight(config: Config, slowed: bool) -> list[str]:
    """What this rank notes."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, new_gloo_groups
    from mtp_dist.verify import preflight as module

    topology = initialize_topology(config, select_device(config))
    notes: list[str] = []
    measured = module.matmul_rate

    def matmul_rate(*arguments: object) -> float:
        assert measured(*arguments) > 0
        return 4.0 if slowed and topology.rank == SLOWED else 10.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "matmul_rate", matmul_rate)
        module.Preflight(config, topology, new_gloo_groups(topology).all, notes.append).on_start(0)
    return notes
