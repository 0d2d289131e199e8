"""Restarts of a SLURM job, counted since its last checkpoint."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_dist.errors import ConfigError
from mtp_dist.monitoring import events
from mtp_dist.monitoring.logs import PACKAGE_LOGGER, configure_logging

Record = Callable[[str, str], None]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    logger = logging.getLogger("mtp_dist.test")
    configure_logging(0)
    PACKAGE_LOGGER.addHandler(events.EventsHandler(tmp_path / events.EVENTS, 0, lambda text: None))
    return lambda kind, text: logger.info(text, extra={"event": kind})


def test_a_checkpoint_is_progress(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(1, 30):
        events.check_progress(tmp_path / events.EVENTS)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        record("start", "goes on")
        record("checkpoint", f"of step {restart}")
    for restart in (30, 31, 32):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        record("start", "goes on")
        events.check_progress(tmp_path / events.EVENTS)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "33")
    with pytest.raises(ConfigError, match="restarted job 7 4 times since its last checkpoint"):
        events.check_progress(tmp_path / events.EVENTS)


def test_only_this_job_s_restarts_count(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "30")
    record("checkpoint", "of another job")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    events.check_progress(tmp_path / events.EVENTS)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "31")
    with pytest.raises(ConfigError, match="restarted job 8 31 times"):
        events.check_progress(tmp_path / events.EVENTS)


def test_without_slurm_nothing_counts(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    record("checkpoint", "of step 1")
    assert "slurm" not in (tmp_path / events.EVENTS).read_text()
    events.check_progress(tmp_path / "no such file")
