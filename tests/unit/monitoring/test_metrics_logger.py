"""Scalars of steps and validations, and the steps that are logged."""

import math
from unittest.mock import Mock

import pytest

from mtp_dist.metrics import HeadMetrics, RankStats, StepMetrics
from mtp_dist.monitoring.callback import StopReason
from mtp_dist.monitoring.metrics_logger import MetricsLogger
from mtp_dist.monitoring.scalars import ThroughputUnits
from mtp_dist.monitoring.writers.writer import MetricsWriter

UNITS = ThroughputUnits(flops_per_token=[500, 1_000], peak_flops=1e6, bytes_per_token={None: 2.0, "web": 4.0})
HEADS = HeadMetrics(
    losses=(1 / 3, math.log(2)), accuracies=(0.5, 0.25), total=1 / 3 + math.log(2), draft_acceptance_rates=(0.75,)
)
RANKS = [RankStats(0, 0.05, 0.1, 0.2, 123_456_789), RankStats(0, 0.01, 0.2, 0.2, 23_456_789)]
HEAD_NAMES = {"loss/head_1", "loss/head_2", "loss/total", "accuracy/head_1", "accuracy/head_2"}
STEP_NAMES = {
    *HEAD_NAMES,
    *(
        "train/learning_rate",
        "train/learning_rate/trunk",
        "train/grad_norm",
        *(f"train/grad_norm/{part}" for part in ("trunk", "head_1", "head_2")),
    ),
    *(f"throughput/{name}" for name in ("tokens_per_second", "model_flops_per_second", "mfu", "data_wait_share")),
    *("memory/peak_bytes", "data/epochs/web"),
}
VALIDATION_NAMES = {*HEAD_NAMES, "bits_per_byte/head_1", "bits_per_byte/head_2"}
VALIDATION_NAMES |= {"draft_acceptance_rate_pos_2", "expected_tokens_per_forward"}
VALIDATION_NAMES = {f"validation/{name}" for name in VALIDATION_NAMES}


def step_metrics(step, tokens=100, seconds=0.5, heads=HEADS, ranks=RANKS):
    norms = {"trunk": 0.5, "head_1": 0.3, "head_2": 0.2}
    rates = {"trunk": 3e-5}
    return StepMetrics(step, heads, 0.7, norms, 3e-4, tokens, seconds, {"web": step / 8}, ranks, rates)


def records(writer):
    """Return the steps and scalars that a stand-in for a writer was called with."""
    return [call.args for call in writer.write.call_args_list]


@pytest.fixture
def writer():
    return Mock(MetricsWriter)


@pytest.fixture
def metrics_logger(writer):
    return MetricsLogger([writer], UNITS, {})


@pytest.mark.parametrize("reason", [*StopReason, None])
def test_steps_with_rank_statistics_are_logged(writer, metrics_logger, reason):
    for step in range(5, 14):
        metrics_logger.on_step(step_metrics(step, ranks=RANKS if step in (5, 9, 13) else ()))
    metrics_logger.on_end(reason)
    assert [step for step, _ in records(writer)] == [5, 9, 13]
    assert [call.args for call in writer.advance.call_args_list] == [(step,) for step in range(5, 14)]
    writer.close.assert_called_once_with(failed=reason not in (StopReason.LAST_STEP, StopReason.SIGNAL))


def test_throughput_covers_all_steps_since_the_last_logged_one(writer, metrics_logger):
    for step, (tokens, seconds) in enumerate([(10, 9.0), (100, 1.0), (200, 4.0), (300, 5.0), (80, 1.0)], 1):
        metrics_logger.on_step(step_metrics(step, tokens, seconds, ranks=RANKS if step in (1, 4) else ()))
    metrics_logger.on_validation(5, None, HEADS)
    for step in (6, 7, 8):
        metrics_logger.on_step(step_metrics(step, 40, 1.0, ranks=RANKS if step == 8 else ()))
    training = [scalars for _, scalars in records(writer) if "loss/total" in scalars]
    assert [scalars["throughput/tokens_per_second"] for scalars in training] == [10 / 9, 600 / 10, 200 / 4]
    assert (training[1]["throughput/model_flops_per_second"], training[1]["throughput/mfu"]) == (60_000, 0.06)
    metrics_logger.on_step(step_metrics(9, 1000, 1.0, ranks=()))
    metrics_logger.on_rollback(8)
    metrics_logger.on_step(step_metrics(9, 40, 1.0))
    assert records(writer)[-1][1]["throughput/tokens_per_second"] == 40, "steps before a rollback do not count"


def test_validation_sets_have_their_own_scalars_and_bytes_per_token(writer, metrics_logger):
    for name in (None, "web"):
        metrics_logger.on_validation(4, name, HEADS)
    (_, unnamed), (_, web) = records(writer)
    assert set(unnamed) == VALIDATION_NAMES
    assert set(web) == {name.replace("validation/", "validation/web/") for name in VALIDATION_NAMES}
    assert web["validation/web/bits_per_byte/head_2"] == unnamed["validation/bits_per_byte/head_2"] / 2


def test_inactive_heads_cost_no_flops(writer, metrics_logger):
    one = HeadMetrics(losses=(1.0,), accuracies=(0.5,), total=1.0)
    for step, heads in enumerate([HEADS, HEADS, one, one], 1):
        metrics_logger.on_step(step_metrics(step, 40, 1.0, heads, () if step == 2 else RANKS))
    flops = [scalars["throughput/model_flops_per_second"] for _, scalars in records(writer)]
    assert flops == [40_000, (40_000 + 20_000) / 2, 20_000]


@pytest.mark.parametrize("peak_flops", [1e6, None])
def test_unknown_peak_gives_zero_mfu_and_one_message(writer, caplog, peak_flops):
    metrics_logger = MetricsLogger([writer], ThroughputUnits([500, 1_000], peak_flops, {}), {})
    metrics_logger.on_start(0)
    for step in (1, 2):
        metrics_logger.on_step(step_metrics(step))
    assert [scalars["throughput/mfu"] > 0 for _, scalars in records(writer)] == [peak_flops is not None] * 2
    assert sum("throughput/mfu is 0" in message for message in caplog.messages) == (peak_flops is None)


def test_pipeline_has_memory_per_stage_and_a_bubble(writer, metrics_logger):
    measured = [(0, 0.3, 11), (0, 0.1, 12), (1, 0.4, 13), (1, 0.4, 10)]
    ranks = [RankStats(stage, 0.25 * stage, busy, 0.4, memory) for stage, busy, memory in measured]
    for step in (1, 2):
        metrics_logger.on_step(step_metrics(step, ranks=ranks if step == 2 else ()))
    [(_, scalars)] = records(writer)
    assert [scalars[f"memory/peak_bytes{stage}"] for stage in ("/stage_0", "/stage_1", "")] == [12, 13, 13]
    assert scalars["throughput/pipeline_bubble"] == pytest.approx(1 - 0.3 / 0.4)
    assert scalars["throughput/data_wait_share"] == 0.25, "of two steps of half a second"
