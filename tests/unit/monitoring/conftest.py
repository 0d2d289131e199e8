"""What the tests of monitoring share."""

import logging

import pytest


@pytest.fixture(autouse=True)
def log_level(caplog):
    """Let caplog see the package's information."""
    caplog.set_level(logging.INFO, logger="mtp_dist")
