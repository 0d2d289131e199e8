"""A part that takes too long ends its process, and the stacks tell where it was."""

import subprocess
import sys

import pytest

from mtp_dist.training.watchdog import HUNG

PROGRAM = """
import sys, time
from mtp_dist.training import watchdog
watchdog.GRACE_SECONDS = 0.5

def sleep_too_long():
    time.sleep(60)

def keep_the_lock_too_long():
    sum(range(10**12))

with watchdog.Watchdog({seconds}, rank=3) as dog:
    for step in (1, 2, 3):
        dog.expect(f"step {{step}}")
        time.sleep(0.4)
    dog.expect("step 4")
    {hang}
time.sleep(1.5)
print("the end")
"""


def run(hang: str, seconds: float | None = 1.0) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(hang=hang, seconds=seconds)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)


def test_a_step_that_hangs_ends_the_process() -> None:
    ended = run("sleep_too_long()")
    assert ended.returncode == HUNG and not ended.stdout
    assert ended.stderr.startswith("error: rank 3: step 4 takes longer than run.step_timeout = 1 s; all threads:\n")
    assert "in sleep_too_long" in ended.stderr


def test_also_where_python_itself_cannot_go_on() -> None:
    ended = run("keep_the_lock_too_long()")
    assert ended.returncode != 0 and not ended.stdout
    assert "in keep_the_lock_too_long" in ended.stderr


@pytest.mark.parametrize(("hang", "seconds"), [("pass", 1.0), ("time.sleep(1.2)", None)])
def test_what_takes_its_time_in_the_limit_is_left_alone(hang: str, seconds: float | None) -> None:
    ended = run(hang, seconds)
    assert ended.returncode == 0 and ended.stdout == "the end\n" and not ended.stderr
