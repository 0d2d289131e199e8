"""Locks of a run's folders: who holds them, and when the lock of an ended run is stale."""

import json
import os
from pathlib import Path

import pytest

from mtp_dist.errors import LaunchError
from mtp_dist.training.run_lock import RunLock, describe_process
from tests.tiny import tiny_config


class Clock:
    """A clock that only `sleep` moves; it calls `on_sleep` then."""

    def __init__(self, on_sleep=lambda: None):
        self.now = 0.0
        self._on_sleep = on_sleep

    def sleep(self, seconds):
        self.now += seconds
        self._on_sleep()


def lock_of(folder, clock=None, **config):
    clock = clock or Clock()
    config = {"run": {"output_dir": str(folder)}} | config
    return RunLock(tiny_config(**config), monotonic=lambda: clock.now, sleep=clock.sleep)


def refusal(lock):
    with pytest.raises(LaunchError) as refused, lock:
        pass
    return str(refused.value)


def write_lock(folder, **changes):
    """Write the lock that another process would have left."""
    with lock_of(folder):
        record = json.loads((folder / "run.lock").read_text()) | {"token": "another"} | changes | {"host": "node-7"}
    folder.mkdir(exist_ok=True)
    (folder / "run.lock").write_text(json.dumps(record) + "\n")
    return folder / "run.lock"


def test_output_dir_belongs_to_one_run(tmp_path):
    out = tmp_path / "new" / "out"
    with lock_of(out):
        message = refusal(lock_of(out))
        assert message.startswith(f"run.output_dir = '{out}' is in use by a run on ")
        assert f"(process {os.getpid()})" in message and f"`kill {os.getpid()}`" in message
        assert str(out / "run.lock") in message
    assert not (tmp_path / "new").exists(), "folders created for the lock only are removed"
    with lock_of(out):
        (out / "metrics.jsonl").touch()
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]


def test_checkpoint_directory_belongs_to_one_run(tmp_path):
    """Also if it lies in the folder of one run and another run names it, or a link to it."""
    (tmp_path / "link").symlink_to(tmp_path / "a" / "checkpoints")
    with lock_of(tmp_path / "a"):
        for name in ("a/checkpoints", "link"):
            message = refusal(lock_of(tmp_path / "b", checkpoint={"directory": str(tmp_path / name)}))
            assert message.startswith(f"checkpoint.directory = '{tmp_path / name}' is in use by ")
        assert not (tmp_path / "b").exists(), "the lock acquired first is released"
        with lock_of(tmp_path / "b"):
            pass


@pytest.mark.parametrize("obstacle", ["mount point", "read-only parent"])
def test_output_dir_that_is_the_checkpoint_directory_has_one_lock(tmp_path, monkeypatch, obstacle):
    """The checkpoints' lock cannot be next to their folder, and both names lead to the same file."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    monkeypatch.setattr(Path, "is_mount", lambda path: obstacle == "mount point" and path == out)
    monkeypatch.setattr(os, "access", lambda path, _: obstacle == "mount point" or path != tmp_path)
    checkpoint = {"directory": str(out)}
    with lock_of(tmp_path / "link", checkpoint=checkpoint):
        assert [path.name for path in out.iterdir()] == ["run.lock"]
        for folder, key in ((out, "run.output_dir"), (tmp_path / "b", "checkpoint.directory")):
            assert refusal(lock_of(folder, checkpoint=checkpoint)).startswith(f"{key} = '{out}' is in use by ")
    assert list(out.iterdir()) == []


ENDED = {"process": describe_process()["process"].rpartition(" ")[0] + " 1"}
OTHER_MACHINE = {"process": "another machine 7"}
STALE = {
    "its PID is another process by now": (ENDED, None, 0, "that process has ended"),
    "its PID is free": (ENDED | {"pid": str(2**22 + 1)}, None, 0, "that process has ended"),
    "SLURM restarted its job": (OTHER_MACHINE | {"job": "77", "restarts": "0"}, None, 0, "SLURM has restarted its job"),
    "another machine without refreshes": (OTHER_MACHINE, None, 60, "it was not refreshed for 60 s"),
    "a machine that failed in the middle of a line": (OTHER_MACHINE, "half a li", 60, "it was not refreshed for 60 s"),
    "a machine that failed in its record": (OTHER_MACHINE, '{"process": 7}', 60, "it was not refreshed for 60 s"),
}


@pytest.mark.parametrize(("record", "content", "seconds", "reason"), STALE.values(), ids=STALE)
def test_stale_lock_is_taken_over(tmp_path, monkeypatch, caplog, record, content, seconds, reason):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path, clock = write_lock(tmp_path, **record), Clock()
    path.write_text(content or path.read_text())
    with lock_of(tmp_path, clock):
        assert seconds <= clock.now < seconds + 5
        assert json.loads(path.read_text())["pid"] == str(os.getpid())
    who = "a run" if content else "a run on node-7 (process "
    assert caplog.messages[-1].startswith(f"{tmp_path}: taking over the lock of {who}")
    assert caplog.messages[-1].endswith(f": {reason}")


def test_refreshed_lock_of_another_machine_is_respected(tmp_path):
    path = write_lock(tmp_path, process="another machine 7", job="77", pid="5")
    refreshed = path.read_text().replace('"beat": "0', '"beat": "1')
    clock = Clock(lambda: clock.now == 9 and path.write_text(refreshed))
    message = refusal(lock_of(tmp_path, clock))
    assert "on node-7 (process 5, SLURM job 77)" in message and "`scancel --signal INT 77`" in message
    assert clock.now < 15


def test_one_of_two_simultaneous_takeovers_wins(tmp_path):
    path = write_lock(tmp_path, **ENDED)
    faster = json.loads(path.read_text()) | {"process": "another machine 7", "token": "faster", "pid": "8"}
    clock = Clock(lambda: path.write_text(json.dumps(faster | {"beat": f"{int(clock.now):010d}"}) + "\n"))
    assert "process 8" in refusal(lock_of(tmp_path, clock))
    assert json.loads(path.read_text())["token"] == "faster"


def test_run_notices_that_its_lock_was_taken_over(tmp_path):
    lock, path, lost = lock_of(tmp_path), tmp_path / "run.lock", []
    with lock:
        before = path.read_text()
        lock.refresh(lost.append)
        after = path.read_text()
        assert before != after and len(before) == len(after) and not lost
        other = after.replace(json.loads(after)["token"], "another")
        path.write_text(other)
        lock.refresh(lost.append)
    assert len(lost) == 1 and str(path) in lost[0]
    assert path.read_text() == other, "another run's lock stays"
