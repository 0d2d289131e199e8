"""From the engine's sums to the metrics of a step, and from these to the scalars of the logs."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtp_dist.engine.engine import head_metrics
from mtp_dist.loss.objective import HeadSums
from mtp_dist.loss.schedule import HeadSchedule
from mtp_dist.metrics import HeadMetrics, RankStats, StepMetrics
from mtp_dist.monitoring.callback import StopReason
from mtp_dist.monitoring.metrics_logger import MetricsLogger
from mtp_dist.monitoring.scalars import ThroughputUnits, validation_scalars
from mtp_dist.monitoring.summary import RunSummary, ValidationResult, print_summary, write_summary
from mtp_dist.monitoring.writers.jsonl import JsonlWriter
from mtp_dist.monitoring.writers.progress import ProgressBar
from mtp_dist.monitoring.writers.tensorboard import TensorBoardWriter
from mtp_dist.training.spikes import SpikeDetector
from tests.tiny import tiny_config

WEIGHTS = (1.0, 0.5, 0.25)


def sums_of(token_order: float = 0.0, **columns: list[float]) -> HeadSums:
    """Return the sums of 3 heads with 8, 4 and no valid targets; the last one is not trained."""
    sums = HeadSums.zeros(3, torch.device("cpu"))
    values = {"cross_entropy": [16.0, 12.0, 0.0], "correct": [2.0, 3.0, 0.0], "targets": [8.0, 4.0, 0.0]}
    for name, column in (values | columns).items():
        getattr(sums, name)[:-1] = torch.tensor(column)
    sums.soft_cross_entropy[-1] = token_order
    return sums


def metrics_of(sums: HeadSums, active: int = 3, **heads: Any) -> HeadMetrics:
    return head_metrics(tiny_config(heads={"count": 3, **heads}), sums, HeadSchedule(WEIGHTS, active))


def test_means_over_the_valid_targets() -> None:
    assert metrics_of(sums_of()) == HeadMetrics((2.0, 3.0, None), (0.25, 0.75, None), 2 + 0.5 * 3)


def test_without_any_valid_target_there_is_no_total() -> None:
    nothing = metrics_of(sums_of(cross_entropy=[0.0] * 3, correct=[0.0] * 3, targets=[0.0] * 3), distillation=0.1)
    assert nothing == HeadMetrics((None,) * 3, (None,) * 3, None, (None, None))
    ordered = metrics_of(sums_of(cross_entropy=[0.0] * 3, correct=[0.0] * 3, targets=[0.0] * 3), token_order=0.1)
    assert ordered.token_order is None and ordered.total is None
    assert SpikeDetector(3.0).update(ordered.losses[0]) is None


def test_a_missing_loss_is_null_in_files_and_a_dash_on_the_terminal(tmp_path: Path) -> None:
    heads = metrics_of(sums_of())
    output = io.StringIO()
    console = Console(file=output, width=80)
    writers = [JsonlWriter(tmp_path / "metrics.jsonl"), TensorBoardWriter(tmp_path, [None]), ProgressBar(1, console)]
    logger = MetricsLogger(writers, ThroughputUnits([1, 2, 3], 1.0, {None: 2.0}), {})
    logger.on_step(StepMetrics(1, heads, 0.5, {}, 1e-3, 100, 1.0, {}, [RankStats(0, 0.0, 1.0, 1.0, 1)]))
    logger.on_validation(1, None, heads)
    logger.on_end(StopReason.LAST_STEP)
    step, validation = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    names = {"loss/head_3", "accuracy/head_3"}
    assert {name for name, value in step.items() if value is None} == names
    of_validation = {f"validation/{name}" for name in (*names, "bits_per_byte/head_3")}
    assert {name for name, value in validation.items() if value is None} == of_validation
    assert step["loss/total"] == 3.5
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    written = set(events.Tags()["scalars"])
    assert "loss/head_2" in written and not written & (names | of_validation)
    assert "head losses 2.0000 3.0000 - | total 3.5000" in output.getvalue()

    summary = RunSummary("demo", 1, 1.0, tmp_path, [ValidationResult(None, heads, 4.0, 2.0)])
    print_summary(summary, console)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.getvalue().splitlines()]
    assert ["3", "-", "-", "-", "-"] in rows
    [written_set] = json.loads(write_summary(summary).read_text())["validation"]
    assert written_set["heads"][2] == {"head": 3, "loss": None, "bits_per_byte": None, "accuracy": None}


def test_only_active_heads() -> None:
    assert metrics_of(sums_of(), active=2) == HeadMetrics((2.0, 3.0), (0.25, 0.75), 2 + 0.5 * 3)
    assert metrics_of(sums_of(), active=1) == HeadMetrics((2.0,), (0.25,), 2.0)


def test_distillation() -> None:
    sums = sums_of(targets=[8.0, 4.0, 2.0], cross_entropy=[16.0, 12.0, 10.0], soft_cross_entropy=[0.0, 20.0, 14.0])
    found = metrics_of(sums, distillation=0.1)
    assert found.losses == (2.0, 3.0, 5.0) and found.distillation == (5.0, 7.0) and found.token_order is None
    assert found.total == pytest.approx(2 + 0.5 * (3 + 0.1 * 5) + 0.25 * (5 + 0.1 * 7), rel=1e-15)
    two = metrics_of(sums, active=2, distillation=0.1)
    assert two.distillation == (5.0,) and two.total == pytest.approx(2 + 0.5 * (3 + 0.1 * 5), rel=1e-15)
    assert metrics_of(sums, active=1, distillation=0.1) == HeadMetrics((2.0,), (0.25,), 2.0)


def test_token_order() -> None:
    found = metrics_of(sums_of(token_order=24.0), active=1, token_order=0.1)
    assert found.token_order == 3.0, "over the valid targets of head 1"
    assert found.losses == (2.0,) and found.distillation == ()
    assert found.total == pytest.approx(2 + 0.1 * 3, rel=1e-15)


def test_scalars_leave_out_what_there_is_not() -> None:
    few = validation_scalars(HeadMetrics((2.0,), (0.25,), 2.0), None, 2.0)
    assert {name.removeprefix("validation/") for name in few} == {
        "loss/head_1",
        "loss/total",
        "accuracy/head_1",
        "bits_per_byte/head_1",
    }
    many = validation_scalars(HeadMetrics((2.0, 3.0, 5.0), (0.1, 0.2, 0.3), 9.0, (5.0, 7.0), 4.0), None, 2.0)
    assert {name: many[f"validation/loss/{name}"] for name in ("head_3", "total", "token_order")} == {
        "head_3": 5.0,
        "total": 9.0,
        "token_order": 4.0,
    }
    assert many["validation/loss/distillation/head_2"] == 5.0 and many["validation/loss/distillation/head_3"] == 7.0
    assert "validation/loss/distillation/head_1" not in many and len(many) == 3 + 1 + 2 + 1 + 3 + 3
