"""Restarts of a SLURM job, counted since its last checkpoint."""

from pathlib import Path

import pytest

from mtp_dist.errors import ConfigError
from mtp_dist.monitoring import events


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> events.EventLog:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return events.EventLog(tmp_path / events.EVENTS, 0)


def test_a_checkpoint_is_progress(log: events.EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart in range(1, 30):
        events.check_progress(tmp_path / events.EVENTS)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        log.record("start", "goes on")
        log.record("checkpoint", f"of step {restart}")
    for restart in (30, 31, 32):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        log.record("start", "goes on")
        events.check_progress(tmp_path / events.EVENTS)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "33")
    with pytest.raises(ConfigError, match="restarted job 7 4 times since its last checkpoint"):
        events.check_progress(tmp_path / events.EVENTS)


def test_only_this_job_s_restarts_count(log: events.EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "30")
    log.record("checkpoint", "of another job")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    events.check_progress(tmp_path / events.EVENTS)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "31")
    with pytest.raises(ConfigError, match="restarted job 8 31 times"):
        events.check_progress(tmp_path / events.EVENTS)


def test_without_slurm_nothing_counts(log: events.EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    log.record("checkpoint", "of step 1")
    assert "slurm" not in (tmp_path / events.EVENTS).read_text()
    events.check_progress(tmp_path / "no such file")
