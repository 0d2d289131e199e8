"""Which ranks print a log record, and where."""

import logging
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest

from mtp_dist.monitoring.callback import CallbackList, StopReason
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


def test_every_callback_ends_also_if_one_fails():
    ends = Mock()
    ends.failing.side_effect = OSError("no room")
    callbacks = CallbackList([SimpleNamespace(on_end=end) for end in (ends.first, ends.failing, ends.last)])
    with pytest.raises(OSError, match="no room"):
        callbacks.on_end(StopReason.SIGNAL)
    assert ends.mock_calls == [getattr(call, name)(StopReason.SIGNAL) for name in ("last", "failing", "first")]
