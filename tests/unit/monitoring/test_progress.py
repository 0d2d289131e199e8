"""What a terminal and a log file show of a run."""

import io
import itertools
import re

from rich.console import Console

from mtp_dist.metrics import HeadMetrics, RankStats, StepMetrics
from mtp_dist.monitoring.scalars import ThroughputWindow, head_scalars, step_scalars, validation_scalars
from mtp_dist.monitoring.writers import progress
from mtp_dist.monitoring.writers.progress import ProgressBar

HEADS = HeadMetrics((2.25, 3.5, 4.125), (0.5, 0.25, 0.125), 9.875)
METRICS = StepMetrics(20, HEADS, 0.75, {}, 3e-4, 100, 1.0, {}, [RankStats(0, 0.0, 1.0, 1.0, 1)])
WINDOW = ThroughputWindow(tokens=123456, flops=120_000_000, seconds=10.0)
SCALARS = head_scalars(METRICS.heads) | step_scalars(METRICS, WINDOW, None)


def test_plain_lines_without_a_terminal(monkeypatch):
    times, output = iter([0.0] * 19 + [60.0] * 2), io.StringIO()
    monkeypatch.setattr(progress, "monotonic", lambda: next(times))
    bar = ProgressBar(120, Console(file=output, width=80))
    for step in range(1, 21):
        bar.advance(step)
        if step in (1, 20):
            bar.write(step, SCALARS)
    bar.write(20, validation_scalars(HEADS, None, 1.0))
    bar.write(20, validation_scalars(HEADS, "web", 1.0))
    bar.write(20, head_scalars(METRICS.heads) | step_scalars(METRICS, WINDOW, 2.9e7))
    bar.rewind(18)
    bar.advance(19)
    bar.write(19, SCALARS)
    bar.close(failed=False)
    first, second, validation, web, with_mfu, repeated = output.getvalue().splitlines()
    losses = "head losses 2.2500 3.5000 4.1250"
    assert first.startswith(f"step 1/120 | {losses} | ") and first.endswith("| ? left")
    described = f"{losses} | total 9.8750 | lr 3.00e-04 | grad norm 0.75 | 12,346 tokens/s"
    left = "0:05:16"  # 60 seconds for the 19 steps after the first, 100 more to go
    assert second == f"step 20/120 | {described} | {left} left"
    assert with_mfu == f"step 20/120 | {described} | 41.4% MFU | {left} left"
    assert repeated == f"step 19/120 | {described} | ? left", "the pace is measured again"
    validated = f"at step 20 | {losses} | bits per byte 3.2461 5.0494 5.9511 | accuracies 0.5000 0.2500 0.1250"
    assert (validation, web) == (f"validation {validated}", f"validation on web {validated}")


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "monotonic", itertools.count(0, 2).__next__)
    output = io.StringIO()
    bar = ProgressBar(50, Console(file=output, force_terminal=True, width=80))
    for step in range(20, 31):  # resumed after step 19
        bar.advance(step)
    bar.write(30, SCALARS)
    bar.write(30, validation_scalars(HEADS, None, 1.0))
    bar.close(failed=False)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "30/50" in plain and "0:00:40 left" in plain
    assert "head losses 2.2500 3.5000 4.1250 | total 9.8750" in plain and "step 30/50 |" not in plain
    assert plain.count("validation at step 30") == 1
    assert output.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again
