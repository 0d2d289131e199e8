"""Who may write into a run's folders, and when the lock of a run that has ended counts no more."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.errors import ConfigError
from tests.tiny import tiny_config


class Clock:
    """Seconds pass when somebody sleeps."""

    def __init__(self, at_each_second: Any = lambda: None) -> None:
        self.now = 0.0
        self._at_each_second = at_each_second

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._at_each_second()


def lock_of(folder: Path, clock: Clock | None = None, **config: Any) -> Any:
    from mtp_dist.training.run_lock import RunLock

    clock = clock or Clock()
    config = {"run": {"output_dir": str(folder)}} | config
    return RunLock(tiny_config(**config), monotonic=lambda: clock.now, sleep=clock.sleep)


def write_lock(folder: Path, **changes: str) -> Path:
    """The lock that another process would have left."""
    with lock_of(folder):
        record = json.loads((folder / "run.lock").read_text()) | {"token": "another"} | changes | {"host": "node-7"}
    folder.mkdir(exist_ok=True)
    (folder / "run.lock").write_text(json.dumps(record) + "\n")
    return folder / "run.lock"


def ended_process() -> dict[str, str]:
    """What a process that has ended would write of itself."""
    program = (
        "import json\nfrom mtp_dist.training.run_lock import describe_process\nprint(json.dumps(describe_process()))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    record: dict[str, str] = json.loads(output)
    return record


def test_a_folder_is_one_runs_until_it_ends(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with lock_of(out):
        with pytest.raises(ConfigError) as refused, lock_of(out):
            pass
        message = str(refused.value)
        assert message.startswith(f"run.output_dir = '{out}' is in use by a run on ")
        assert f"(process {os.getpid()})" in message and f"`kill {os.getpid()}`" in message
        assert str(out / "run.lock") in message
    assert not (tmp_path / "new").exists(), "folders that only the lock needed are gone"
    with lock_of(out):
        (out / "metrics.jsonl").touch()
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]


def test_a_checkpoint_folder_is_one_runs_too(tmp_path: Path) -> None:
    """Also if one run has it below its folder, and another one names it, or a link to it."""
    (tmp_path / "link").symlink_to(tmp_path / "a" / "checkpoints")
    with lock_of(tmp_path / "a"):
        for name in ("a/checkpoints", "link"):
            with pytest.raises(ConfigError) as refused:
                lock_of(tmp_path / "b", checkpoint={"directory": str(tmp_path / name)}).__enter__()
            assert str(refused.value).startswith(f"checkpoint.directory = '{tmp_path / name}' is in use by ")
        assert not (tmp_path / "b").exists(), "what was locked first is released"
        with lock_of(tmp_path / "b"):
            pass


@pytest.mark.parametrize("obstacle", ["a mount point", "a parent that cannot be written"])
def test_one_folder_for_a_run_and_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    """Its checkpoints cannot have their lock beside it: it has one lock, under whichever of its names."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    if obstacle == "a mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    else:
        monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)
    with lock_of(tmp_path / "link", checkpoint={"directory": str(out)}):
        assert [path.name for path in out.iterdir()] == ["run.lock"]
        with pytest.raises(ConfigError) as refused:
            lock_of(out, checkpoint={"directory": str(out)}).__enter__()
        assert str(refused.value).startswith(f"run.output_dir = '{out}' is in use by ")
        with pytest.raises(ConfigError) as refused:
            lock_of(tmp_path / "b", checkpoint={"directory": str(out)}).__enter__()
        assert str(refused.value).startswith(f"checkpoint.directory = '{out}' is in use by ")
    assert list(out.iterdir()) == []


def test_a_killed_run_on_this_machine_counts_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    write_lock(tmp_path, **ended_process())
    with lock_of(tmp_path, clock):
        record = json.loads((tmp_path / "run.lock").read_text())
    assert record["pid"] == str(os.getpid()) and clock.now < 5
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: takes over the lock of a run on node-7 (process ")
    assert line.endswith("that process has ended")


def test_another_process_with_the_same_number_is_not_taken_for_it(tmp_path: Path) -> None:
    from mtp_dist.training.run_lock import describe_process

    assert describe_process()["process"] != ended_process()["process"]
    machine, _, _ = describe_process()["process"].rpartition(" ")
    write_lock(tmp_path, process=f"{machine} 1")
    with lock_of(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "half a li", '{"process": 7}'])
def test_a_lock_that_is_not_refreshed_counts_no_more(tmp_path: Path, content: str) -> None:
    """As of another machine that has failed, or of one that failed when it wrote the lock."""
    clock = Clock()
    path = write_lock(tmp_path, process="another machine 7")
    path.write_text(content or path.read_text())
    with lock_of(tmp_path, clock):
        assert 60 <= clock.now < 65


def test_a_lock_that_is_refreshed_counts(tmp_path: Path) -> None:
    path = write_lock(tmp_path, process="another machine 7", job="77", pid="5")

    def refresh() -> None:
        if clock.now == 9:
            path.write_text(path.read_text().replace('"beat": "0', '"beat": "1'))

    clock = Clock(refresh)
    with pytest.raises(ConfigError) as refused:
        lock_of(tmp_path, clock).__enter__()
    assert "on node-7 (process 5, SLURM job 77)" in str(refused.value) and "`scancel 77`" in str(refused.value)
    assert clock.now < 15


def test_a_restart_of_the_same_job_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM starts a job again on another node only if its first start is over."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_lock(tmp_path, process="another machine 7", job="77", restarts="0")
    clock = Clock()
    with lock_of(tmp_path, clock):
        assert clock.now < 5


def test_of_two_that_take_a_lock_over_one_gets_it(tmp_path: Path) -> None:
    path = write_lock(tmp_path, **ended_process())
    mine = json.loads(path.read_text()) | {"process": "another machine 7", "token": "faster", "pid": "8"}

    def other() -> None:
        record = mine | {"beat": f"{int(clock.now):010d}"}
        path.write_text(json.dumps(record) + "\n")

    clock = Clock(other)
    with pytest.raises(ConfigError, match=r"process 8"):
        lock_of(tmp_path, clock).__enter__()
    assert json.loads(path.read_text())["token"] == "faster"


def test_a_run_whose_lock_was_taken_over_notices_and_leaves_it(tmp_path: Path) -> None:
    lock = lock_of(tmp_path)
    lost: list[str] = []
    with lock:
        before = (tmp_path / "run.lock").read_text()
        lock.refresh(lost.append)
        after = (tmp_path / "run.lock").read_text()
        assert before != after and len(before) == len(after) and not lost
        write = after.replace(json.loads(after)["token"], "another")
        (tmp_path / "run.lock").write_text(write)
        lock.refresh(lost.append)
    [text] = lost
    assert str(tmp_path / "run.lock") in text
    assert (tmp_path / "run.lock").read_text() == write, "it is not this run's to remove"
