"""From the engine's sums to the metrics of a step, and how logs show a loss without targets."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mtp_dist.data.datasets import ValidationSet
from mtp_dist.engine.engine import head_metrics
from mtp_dist.loss.objective import HeadSums
from mtp_dist.loss.schedule import HeadSchedule
from mtp_dist.metrics import HeadMetrics
from mtp_dist.monitoring.callback import StopReason
from mtp_dist.monitoring.metrics_logger import MetricsLogger
from mtp_dist.monitoring.scalars import ThroughputUnits, validation_scalars
from mtp_dist.monitoring.summary import RunSummary, print_summary, write_summary
from mtp_dist.monitoring.writers.jsonl import JsonlWriter
from mtp_dist.monitoring.writers.progress import ProgressBar
from mtp_dist.monitoring.writers.tensorboard import TensorBoardWriter
from mtp_dist.training.spikes import SpikeDetector
from tests.tiny import tiny_config
from tests.unit.monitoring.test_metrics_logger import step_metrics
from tests.unit.monitoring.test_writers import read_tensorboard

NO_TARGETS = {"cross_entropy": [0.0] * 3, "correct": [0.0] * 3, "targets": [0.0] * 3}
DISTILLED = {"cross_entropy": [16.0, 12.0, 10.0], "targets": [8.0, 4.0, 2.0]}
DISTILLED |= {"soft_cross_entropy": [0.0, 20.0, 14.0], "distillation": 0.1}
VARIED = DISTILLED | {"distillation": 0.0, "total_variation": [0.0, 2.0, 0.5], "total_variation_weight": 3.0}
ALL_ACCURACIES, LOSS_2, LOSS_3 = (0.25, 0.75, 0.0), 0.5 * (3 + 0.1 * 5), 0.25 * (5 + 0.1 * 7)


def metrics_of(active=3, token_order_sum=0.0, acceptance=None, **values):
    """Return the metrics of 3 heads with 8, 4 and no targets. values: columns of the sums, or keys of `heads`."""
    columns = {"cross_entropy": [16.0, 12.0, 0.0], "correct": [2.0, 3.0, 0.0], "targets": [8.0, 4.0, 0.0]} | values
    heads = {key: columns.pop(key) for key in ("distillation", "token_order") if key in columns}
    heads["total_variation"] = columns.pop("total_variation_weight", 0.0)
    sums = HeadSums(torch.zeros(4, len(HeadSums.COLUMNS), dtype=torch.float64))
    for name, column in columns.items():
        getattr(sums, name)[:-1] = torch.tensor(column)
    sums.soft_cross_entropy[-1] = token_order_sum
    config = tiny_config(heads={"count": 3, **heads})
    acceptance = None if acceptance is None else torch.tensor(acceptance, dtype=torch.float64)
    return head_metrics(config, sums, HeadSchedule((1.0, 0.5, 0.25), active), acceptance)


NONE = (None,) * 3
CASES = {
    "means over valid targets": ({}, HeadMetrics((2.0, 3.0, None), (0.25, 0.75, None), 3.5)),
    "active heads only": ({"active": 2}, HeadMetrics((2.0, 3.0), (0.25, 0.75), 3.5)),
    "one active head": ({"active": 1}, HeadMetrics((2.0,), (0.25,), 2.0)),
    "no target": (NO_TARGETS | {"distillation": 0.1}, HeadMetrics(NONE, NONE, None, (None, None))),
    "no target for the order": (NO_TARGETS | {"token_order": 0.1}, HeadMetrics(NONE, NONE, None)),
    "distillation": (DISTILLED, HeadMetrics((2.0, 3.0, 5.0), ALL_ACCURACIES, 2 + LOSS_2 + LOSS_3, (5.0, 7.0))),
    "distilled head 2": (DISTILLED | {"active": 2}, HeadMetrics((2.0, 3.0), (0.25, 0.75), 2 + LOSS_2, (5.0,))),
    "no distilled head": (DISTILLED | {"active": 1}, HeadMetrics((2.0,), (0.25,), 2.0)),
    "total variation": (
        VARIED,
        HeadMetrics(
            (2.0, 3.0, 5.0),
            ALL_ACCURACIES,
            2 + 0.5 * (3 + 3 * 0.5) + 0.25 * (5 + 3 * 0.25),
            total_variation=(0.5, 0.25),
        ),
    ),
    "token order over the targets of head 1": (
        {"token_order": 0.1, "token_order_sum": 24.0, "active": 1},
        HeadMetrics((2.0,), (0.25,), 2 + 0.1 * 3, token_order=3.0),
    ),
}


@pytest.mark.parametrize(("values", "expected"), CASES.values(), ids=CASES)
def test_head_metrics(values, expected):
    found = metrics_of(**values)
    assert found.total == (None if expected.total is None else pytest.approx(expected.total, rel=1e-15))
    assert replace(found, total=None) == replace(expected, total=None)
    assert expected.losses[0] is not None or SpikeDetector(3.0).update(found.losses[0]) is None


@pytest.mark.parametrize(
    ("sums", "active", "rates", "tokens_per_forward"),
    [
        ([[8, 6], [4, 2]], 3, (0.75, 0.375), 2.125),
        ([[8, 6], [4, 2]], 2, (0.75,), 1.75),
        ([[8, 6], [4, 2]], 1, (), None),
        ([[8, 0], [0, 0]], 3, (0.0, 0.0), 1.0),
        ([[0, 0], [0, 0]], 3, (None, None), None),
    ],
)
def test_acceptance_up_to_a_distance_is_a_product(sums, active, rates, tokens_per_forward):
    found = metrics_of(active, acceptance=sums)
    assert found.draft_acceptance_rates == rates and found.expected_tokens_per_forward == tokens_per_forward


def test_missing_loss_is_null_in_files_and_a_dash_on_the_terminal(tmp_path):
    heads, output = metrics_of(), io.StringIO()
    console = Console(file=output, width=80)
    writers = [JsonlWriter(tmp_path / "metrics.jsonl"), TensorBoardWriter(tmp_path, [None]), ProgressBar(1, console)]
    logger = MetricsLogger(writers, ThroughputUnits([1, 2, 3], 1.0, {None: 2.0}), {})
    logger.on_step(step_metrics(1, heads=heads))
    logger.on_validation(1, None, heads)
    logger.on_end(StopReason.LAST_STEP)
    step, validation = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    missing = {"loss/head_3", "accuracy/head_3"}
    missing_in_validation = {f"validation/{name}" for name in (*missing, "bits_per_byte/head_3")}
    assert {name for name, value in step.items() if value is None} == missing
    assert {name for name, value in validation.items() if value is None} == missing_in_validation
    assert step["loss/total"] == 3.5
    written = set(read_tensorboard(tmp_path).Tags()["scalars"])
    assert "loss/head_2" in written and not written & (missing | missing_in_validation)
    assert "head losses 2.0000 3.0000 - | total 3.5000" in output.getvalue()

    summary = RunSummary("demo", 1, 1.0, tmp_path, [(ValidationSet(None, (), 4.0, 2.0), heads)])
    print_summary(summary, console)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.getvalue().splitlines()]
    assert ["3", "-", "-", "-", "-"] in rows
    [written_set] = json.loads(write_summary(summary).read_text())["validation"]
    assert written_set["heads"][2] == {"head": 3, "loss": None, "bits_per_byte": None, "accuracy": None}


def test_validation_scalars_of_auxiliary_losses():
    metrics = HeadMetrics((2.0, 3.0, 5.0), (0.1, 0.2, 0.3), 9.0, (5.0, 7.0), (0.5, 0.25), 4.0)
    scalars = validation_scalars(metrics, None, 2.0)
    expected = {"head_3": 5.0, "total": 9.0, "token_order": 4.0, "distillation/head_2": 5.0, "distillation/head_3": 7.0}
    expected |= {"total_variation/head_2": 0.5, "total_variation/head_3": 0.25}
    assert {name: scalars[f"validation/loss/{name}"] for name in expected} == expected
    assert "validation/loss/distillation/head_1" not in scalars and len(scalars) == 3 + 1 + 2 + 2 + 1 + 3 + 3
