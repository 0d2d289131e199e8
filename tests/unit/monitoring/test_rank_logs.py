"""A rank's output is in its file and on the terminal, however the rank ends."""

import os
import shutil
import signal
import sys
from subprocess import PIPE, Popen

import pytest

from mtp_dist.training.run_folder import archive_earlier_run
from tests.integration import jobs
from tests.tiny import tiny_config

START = """
import os, signal, subprocess, sys, time
from pathlib import Path
from mtp_dist.monitoring.rank_logs import tee_output
tee_output(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), is_new=sys.argv[4] == "new")
"""


def start(code, output_dir, how="new", rank=1, ranks=4, stdin=None):
    """Start a rank in a process group of its own, as under a launcher."""
    environment = os.environ | {"PYTHONPATH": str(jobs.ROOT)}
    command = [sys.executable, "-c", START + code, str(output_dir), str(rank), str(ranks), how]
    return Popen(command, env=environment, text=True, process_group=0, stdin=stdin, stdout=PIPE, stderr=PIPE)


def run(*arguments, **options):
    return start(*arguments, **options).communicate(timeout=300)


def log(output_dir, rank=1):
    return (output_dir / f"logs/rank_{rank:05d}.log").read_text().splitlines()


def archive(output_dir, rank_logs=True):
    archive_earlier_run(tiny_config(run={"output_dir": str(output_dir)}, log={"rank_logs": rank_logs}))


def test_all_output_is_in_the_file_and_on_the_terminal(tmp_path):
    code = """
print("printed")
os.write(2, b"from C\\n")
subprocess.run(["sh", "-c", "echo from a child"])
raise RuntimeError("nobody caught it")
"""
    output, errors = run(code, tmp_path)
    header, *lines = log(tmp_path)
    assert header.startswith("--- ") and ": rank 1 of 4 starts on " in header
    assert sorted(output.splitlines()) == ["from a child", "printed"]
    assert errors.startswith("from C\nTraceback") and errors.endswith("RuntimeError: nobody caught it\n")
    assert sorted(lines) == sorted((output + errors).splitlines())


SIGNAL_TO_ALL_PROCESSES = """
import psutil
signal.signal({0}, lambda *_: None)
for process in [*psutil.Process().children(), psutil.Process()]:
    process.send_signal({0})
time.sleep(0.5)
print("saved")
"""
DEATHS = ["os._exit(70)", "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"]


@pytest.mark.parametrize(
    "code",
    [
        *(f"print('saved', flush=True)\n{death}" for death in DEATHS),
        *(SIGNAL_TO_ALL_PROCESSES.format(number.value) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)),
    ],
)
def test_nothing_is_lost_if_a_rank_dies_or_all_processes_get_a_signal(tmp_path, code):
    assert run(code, tmp_path) == ("saved\n", "")
    assert log(tmp_path)[1:] == ["saved"]


def test_file_is_complete_after_the_terminal_is_closed(tmp_path):
    code = "print('one', flush=True)\nsys.stdin.read()\nfor _ in range(9): print('two', flush=True)"
    rank = start(code, tmp_path, stdin=PIPE)
    assert rank.stdout.readline() == "one\n"
    for stream in (rank.stdout, rank.stdin):
        stream.close()
    assert rank.wait(timeout=120) == 0
    rank.stderr.close()
    assert log(tmp_path)[1:] == ["one", *["two"] * 9]


def test_rank_ends_after_its_last_line_is_copied(tmp_path, monkeypatch):
    slow = tmp_path / "bin/tee"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 1\nexec {shutil.which("tee")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
    rank = start("print('done')", tmp_path)
    assert rank.wait(timeout=120) == 0
    assert log(tmp_path)[1:] == ["done"]
    rank.communicate()


def test_child_process_does_not_delay_the_end(tmp_path):
    rank = start("print(subprocess.Popen(['sleep', '1000']).pid, flush=True)", tmp_path)
    try:
        assert rank.wait(timeout=120) == 0
    finally:
        os.kill(int(rank.stdout.readline()), signal.SIGKILL)
        rank.communicate()


def test_restart_appends_and_a_new_run_starts_new_files(tmp_path):
    for rank in (0, 1):
        run("print('one')", tmp_path, "new", rank, 2)
        run("print('two')", tmp_path, "resumed", rank, 2)
        assert log(tmp_path, rank)[1::2] == ["one", "two"]
    for text in ("failed early", "started"):  # a smaller run without rank 1, whose first start archived nothing
        run(f"print('{text}')", tmp_path, rank=0, ranks=1)
    archive(tmp_path)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank_00000.log"]
    assert log(tmp_path, 0)[1::2] == ["failed early", "started"]
    for rank in (0, 1):
        assert log(tmp_path / "earlier-1", rank)[1::2] == ["one", "two"]
    archive(tmp_path, rank_logs=False)
    assert not (tmp_path / "logs").exists()
    assert log(tmp_path / "earlier-2", 0)[1::2] == ["failed early", "started"]
