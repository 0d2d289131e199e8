"""What integration tests share."""

import pytest
import torch

from tests.integration import jobs


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The configuration of a run in this process, without a launcher's variables."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # select_device sets these two: restore them afterwards.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)
    return jobs.write_config(tmp_path)
