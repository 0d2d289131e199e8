"""A tiny model with random weights, opened for analysis."""

import pytest

from mtp_dist.analysis.trained_model import TrainedModel
from tests.unit.convert.folders import write_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Four heads, sequences of 16 tokens."""
    folder = tmp_path_factory.mktemp("analysis") / "four"
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint):
    return TrainedModel.open(checkpoint)
