"""The preflight on every rank, with stand-ins for the matmuls: on a busy machine any rank may be slow."""

import logging

import pytest

SLOWED = 2


def preflight(config, slowed):
    """Return this rank's log messages."""
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, new_gloo_groups
    from mtp_dist.monitoring.logs import PACKAGE_LOGGER, configure_logging
    from mtp_dist.verify import preflight as module

    topology = initialize_topology(config, select_device(config))
    configure_logging(topology.rank)
    messages, recorder = [], logging.Handler()
    recorder.emit = lambda record: messages.append(record.getMessage())
    PACKAGE_LOGGER.addHandler(recorder)
    measured = module.matmul_rate

    def matmul_rate(*arguments):
        assert measured(*arguments) > 0
        return 4.0 if slowed and topology.rank == SLOWED else 10.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "matmul_rate", matmul_rate)
        module.run_preflight(config, topology, new_gloo_groups(topology).all)
    return messages
