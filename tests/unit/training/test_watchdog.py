"""A phase that takes too long ends its process, and the stacks show where it was."""

import subprocess
import sys

import pytest

# Three steps of 0.9 s and a fourth one, by a clock that only the program moves.
PROGRAM = """
import threading, time
from mtp_dist.training import watchdog
watchdog.GRACE_SECONDS = {grace}
now = [0.0]
watchdog.monotonic = lambda: now[0]

def keep_the_lock_too_long():
    sum(range(10**12))

with watchdog.Watchdog({seconds}, rank=3) as dog:
    for step in (1, 2, 3):
        dog.enter(f"step {{step}}")
        now[0] += 0.9
    dog.enter("step 4")
    {hang}
for thread in threading.enumerate():
    if thread.name == "watchdog":
        thread.join()
print("the end")
"""


def run(hang, seconds=1.0, grace=600.0):
    program = PROGRAM.format(hang=hang, seconds=seconds, grace=grace)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)


def test_thread_that_keeps_the_interpreter_lock_ends_the_process():
    ended = run("keep_the_lock_too_long()", grace=0.5)
    assert ended.returncode != 0 and not ended.stdout
    assert "in keep_the_lock_too_long" in ended.stderr


@pytest.mark.parametrize(("hang", "seconds"), [("pass", 1.0), ("time.sleep(1.5)", 1.0), ("now[0] += 1000", None)])
def test_phases_within_the_limit_do_not_end_the_process(hang, seconds):
    ended = run(hang, seconds)
    assert ended.returncode == 0 and ended.stdout == "the end\n" and not ended.stderr
