"""What a rank writes is in its file and on the terminal, however the rank ends."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_dist.monitoring.run_folder import archive_previous_run
from tests.tiny import tiny_config

PROJECT = Path(__file__).parents[3]
START = """
import os, signal, subprocess, sys, time
from pathlib import Path
from mtp_dist.monitoring.rank_logs import tee_output
tee_output(Path(sys.argv[1]), anew=sys.argv[2] == "anew")
"""


def start(
    code: str, output_dir: Path, how: str = "anew", rank: int = 1, ranks: int = 4, stdin: int | None = None
) -> subprocess.Popen[str]:
    """A rank, in a process group of its own as under a launcher."""
    return subprocess.Popen(
        [sys.executable, "-c", START + code, str(output_dir), how],
        env=os.environ | {"PYTHONPATH": str(PROJECT), "RANK": str(rank), "WORLD_SIZE": str(ranks)},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def run(code: str, output_dir: Path, how: str = "anew", rank: int = 1, ranks: int = 4) -> tuple[str, str]:
    return start(code, output_dir, how, rank, ranks).communicate(timeout=300)


def log(output_dir: Path, rank: int = 1) -> list[str]:
    return (output_dir / f"logs/rank_{rank:05d}.log").read_text().splitlines()


def test_every_kind_of_output_is_in_the_file_and_on_the_terminal(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("ending", ["os._exit(70)", "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
def test_nothing_is_lost_where_a_rank_dies(tmp_path: Path, ending: str) -> None:
    output, _ = run(f"print('the last words', flush=True)\n{ending}", tmp_path)
    assert output == "the last words\n"
    assert log(tmp_path)[1] == "the last words"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_copying_outlives_a_signal_to_all_processes_of_the_job(tmp_path: Path, number: int) -> None:
    code = f"""
import psutil
signal.signal({number}, lambda *_: None)
for process in [*psutil.Process().children(), psutil.Process()]:
    process.send_signal({number})
time.sleep(0.5)
print("saved")
"""
    output, errors = run(code, tmp_path)
    assert (output, errors) == ("saved\n", "")
    assert log(tmp_path)[1:] == ["saved"]


def test_the_file_is_whole_after_the_reader_of_the_terminal_went_away(tmp_path: Path) -> None:
    code = "print('one', flush=True)\nsys.stdin.read()\nfor _ in range(9): print('two', flush=True)"
    rank = start(code, tmp_path, stdin=subprocess.PIPE)
    assert rank.stdin and rank.stdout and rank.stderr
    assert rank.stdout.readline() == "one\n"
    rank.stdout.close()
    rank.stdin.close()
    assert rank.wait(timeout=120) == 0
    rank.stderr.close()
    assert log(tmp_path)[1:] == ["one", *["two"] * 9]


def test_a_rank_ends_when_its_last_line_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "bin/tee"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 1\nexec {shutil.which("tee")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}{os.pathsep}{os.environ['PATH']}")
    rank = start("print('done')", tmp_path)
    assert rank.wait(timeout=120) == 0
    assert log(tmp_path)[1:] == ["done"]
    rank.communicate()


def test_a_child_that_lives_on_does_not_hold_up_the_end(tmp_path: Path) -> None:
    code = "print(subprocess.Popen(['sleep', '1000']).pid, flush=True)"
    rank = start(code, tmp_path)
    try:
        assert rank.wait(timeout=120) == 0
    finally:
        assert rank.stdout
        os.kill(int(rank.stdout.readline()), signal.SIGKILL)
        rank.communicate()


def test_a_restart_appends_and_a_new_run_begins_new_files(tmp_path: Path) -> None:
    config = tiny_config(run={"output_dir": str(tmp_path)}, log={"rank_logs": True})
    for rank in (0, 1):
        run("print('one')", tmp_path, "anew", rank, 2)
        run("print('two')", tmp_path, "goes on", rank, 2)
        header, one, other_header, two = log(tmp_path, rank)
        assert (one, two) == ("one", "two") and header[:4] == other_header[:4] == "--- "

    run("print('three')", tmp_path, rank=0, ranks=1)  # a smaller run: there is no rank 1
    archive_previous_run(config)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_00000.log"]
    assert log(tmp_path, 0)[1:] == ["three"]
    for rank in (0, 1):
        assert log(tmp_path / "earlier-1", rank)[1::2] == ["one", "two"]


def test_the_log_of_a_start_that_failed_before_its_run_began_goes_on(tmp_path: Path) -> None:
    for text in ("an earlier run", "failed early", "began"):
        run(f"print('{text}')", tmp_path)
    archive_previous_run(tiny_config(run={"output_dir": str(tmp_path)}, log={"rank_logs": True}))
    assert log(tmp_path)[1::2] == ["failed early", "began"]
    assert log(tmp_path / "earlier-1")[1::2] == ["an earlier run"]


def test_logs_of_an_earlier_run_are_set_aside_by_a_run_without_logs(tmp_path: Path) -> None:
    run("print('one')", tmp_path)
    archive_previous_run(tiny_config(run={"output_dir": str(tmp_path)}))
    assert not (tmp_path / "logs").exists()
    assert log(tmp_path / "earlier-1")[1:] == ["one"]


def test_logs_in_a_linked_folder_are_set_aside_within_it(tmp_path: Path) -> None:
    """They may be on another disk, where no file can be moved from there to the run's folder."""
    shared, out = tmp_path / "shared", tmp_path / "out"
    for folder in (out, shared / "earlier"):
        folder.mkdir(parents=True)
    (out / "logs").symlink_to(shared)
    for name in ("rank_00000.log", "earlier/rank_00000.log", "earlier/rank_00001.log", "others.log"):
        (shared / name).write_text(name)
    archive_previous_run(tiny_config(run={"output_dir": str(out)}, log={"rank_logs": True}))
    assert [path.name for path in out.iterdir()] == ["logs"]
    aside = {path.name: path.read_text() for path in (shared / "earlier-1").iterdir()}
    assert aside == {name: f"earlier/{name}" for name in ("rank_00000.log", "rank_00001.log")}
    left = ["earlier", "earlier-1", "others.log", "rank_00000.log"]
    assert sorted(path.name for path in shared.iterdir()) == left
