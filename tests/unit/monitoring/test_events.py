"""`events.jsonl`, and restarts of a SLURM job counted since its last checkpoint."""

import logging
import signal
from dataclasses import replace

import pytest

from mtp_dist.errors import LaunchError
from mtp_dist.monitoring.events import EVENTS, EventRecorder, check_progress
from mtp_dist.monitoring.logs import PACKAGE_LOGGER, configure_logging
from tests.unit.monitoring.test_metrics_logger import step_metrics
from tests.unit.monitoring.test_writers import full_disk, read_lines

logger = logging.getLogger("mtp_dist.test")


def start(path, completed_steps, shown):
    configure_logging(0)
    events = EventRecorder(path, completed_steps, 9, shown.append)
    PACKAGE_LOGGER.addHandler(events)
    return events


def record(text, event="note"):
    logger.info(text, extra={"event": event})


def test_events_survive_a_full_disk_and_an_incomplete_line(tmp_path, capsys):
    path, shown = tmp_path / EVENTS, []
    start(path, 0, shown)
    record("started")
    with path.open("a") as file:
        file.write('{"time": "20')
    start(path, 0, shown)
    logger.info("not an event")
    record("resumed")
    with full_disk(path.stat().st_size + 5):
        record("lost")
        record("lost")
    record("there is room again")
    assert [line["text"] for line in read_lines(path)] == ["started", "resumed", "there is room again"]
    assert shown == ["started", "resumed", "lost", "lost", "there is room again"]
    output = capsys.readouterr()
    assert [line for line in output.out.splitlines() if line != "not an event"] == shown
    assert output.err.count("events.jsonl cannot be written, training continues") == 1


def test_events_of_training_with_their_steps(tmp_path):
    events = start(tmp_path / EVENTS, 3, [])
    record("Resuming", "start")
    events.on_step(replace(step_metrics(4), skipped="NaN on rank 3"))
    events.on_step(step_metrics(5))
    events.on_spike(5, "7 deviations")
    events.on_rollback(2)
    record("Rolled back", "rollback")
    events.on_step(step_metrics(3))
    events.on_stop(3, signal.SIGTERM)
    assert [(line["kind"], line["step"], line["text"]) for line in read_lines(tmp_path / EVENTS)] == [
        ("start", 3, "Resuming"),
        ("skip", 4, "step 4 changed no parameter: NaN on rank 3"),
        ("spike", 5, "step 5 is a spike: 7 deviations"),
        ("rollback", 2, "Rolled back"),
        ("stop", 3, "SIGTERM: stopping after step 3 of 9 with a checkpoint; the same command resumes the run"),
    ]


def test_checkpoint_counts_as_progress(tmp_path, monkeypatch):
    path = tmp_path / EVENTS
    start(path, 0, [])

    def restart(count, job="7"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
        record("Resuming", "start")
        check_progress(path)

    for count in range(1, 30):
        restart(count)
        record(f"Saved the checkpoint of step {count}", "checkpoint")
    for count in (30, 31, 32):
        restart(count)
    with pytest.raises(LaunchError, match="restarted job 7 4 times since its last checkpoint"):
        restart(33)
    restart(3, "8")
    with pytest.raises(LaunchError, match="restarted job 8 31 times"):
        restart(31, "8")

    monkeypatch.delenv("SLURM_JOB_ID")
    record("Saved", "checkpoint")
    assert "slurm_job" in read_lines(path)[-2] and read_lines(path)[-1].keys() == {"time", "step", "kind", "text"}
    check_progress(path)
