"""What all tests share."""

import json
import logging
import os
import signal
from contextlib import closing
from pathlib import Path

import hypothesis
import pytest

from mtp_dist.provenance import provenance
from tests.ranks import Ranks

# Before torch is imported: the workers of a suite and the ranks of its jobs share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The machines that run the tests are busy ones: time limits of single examples would only report that.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


def pytest_configure():
    """Let SIGINT and SIGHUP reach the jobs of the tests, also if pytest runs in the background or under nohup.

    Both are ignored there, and a training leaves a signal ignored that it was started to ignore.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_addoption(parser):
    parser.addoption("--curve-steps", type=int, default=2, help="steps of each run of the whole parity matrix")
    parser.addoption("--parity-json", type=Path, help="write the errors of the parity tests into this file")


@pytest.fixture(autouse=True)
def package_logger():
    """Let pytest's caplog see the package's records, also after a test that calls `configure_logging`."""
    logger = logging.getLogger("mtp_dist")
    logger.setLevel(logging.INFO)
    yield
    logger.handlers, logger.propagate = [], True


@pytest.fixture(scope="session")
def curve_steps(request):
    return request.config.getoption("--curve-steps")


@pytest.fixture(scope="session")
def parity_records(request):
    """One record per run of the parity matrix."""
    records = []
    yield records
    if path := request.config.getoption("--parity-json"):
        path.write_text(json.dumps({"measured": provenance(), "runs": records}, indent=1) + "\n")


@pytest.fixture(scope="session")
def ranks():
    """Four ranks that all tests of a session share."""
    with closing(Ranks(4)) as pool:
        yield pool
