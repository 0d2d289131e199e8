"""Which ranks print a log record, and where."""

import logging

import pytest

from mtp_dist.monitoring.callback import Callback, CallbackList, StopReason
from mtp_dist.monitoring.logs import configure_logging

logger = logging.getLogger("mtp_dist.some.module")


@pytest.mark.parametrize(("rank", "printed"), [(0, ["of rank 0", "of all ranks"]), (3, ["of all ranks"])])
def test_only_rank_0_prints_unless_meant_for_all(rank, printed, capsys):
    for _ in range(2):
        configure_logging(rank)  # a second call does not double the lines
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logger.log(level, "of rank %d", 0)
        logger.log(level, "of all ranks", extra={"all_ranks": True})
    output = capsys.readouterr()
    assert output.out.splitlines() == printed
    assert output.err.splitlines() == [f"warning: {text}" for text in printed]


class Ending(Callback):
    def __init__(self, ended, name):
        self.ended, self.name = ended, name

    def on_end(self, reason):
        self.ended += [self.name, reason]
        if self.name == "failing":
            raise OSError("no room")


def test_every_callback_ends_also_if_one_fails():
    ended = []
    callbacks = CallbackList([Ending(ended, name) for name in ("first", "failing", "last")])
    with pytest.raises(OSError, match="no room"):
        callbacks.on_end(StopReason.SIGNAL)
    assert ended == ["last", StopReason.SIGNAL, "failing", StopReason.SIGNAL, "first", StopReason.SIGNAL]
