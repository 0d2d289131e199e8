"""The files that a run leaves behind, read back by the programs that users open them with."""

import json
import logging
import math
import resource
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from mtp_dist.metrics import HeadMetrics, RankStats, StepMetrics
from mtp_dist.monitoring.callback import StopReason
from mtp_dist.monitoring.callbacks import (
    MetricsFile,
    MetricsLogger,
    MetricsWriter,
    ThroughputUnits,
    ThroughputWindow,
    bits_per_byte,
    step_scalars,
)
from mtp_dist.monitoring.dashboards import TensorBoardWriter
from mtp_dist.monitoring.events import EventsHandler
from mtp_dist.monitoring.logs import PACKAGE_LOGGER, configure_logging

RATES = ThroughputUnits(flops_per_token=[500, 1_000], peak_flops=1e6, bytes_per_token={None: 2.0, "web": 4.0})
HEADS = HeadMetrics(losses=(1 / 3, math.log(2)), accuracies=(0.5, 0.25), total=1 / 3 + math.log(2))

RANKS = [RankStats(0, 0.05, 0.1, 0.2, 123_456_789), RankStats(0, 0.01, 0.2, 0.2, 23_456_789)]

STEP_NAMES = {
    "loss/head_1",
    "loss/head_2",
    "loss/total",
    "accuracy/head_1",
    "accuracy/head_2",
    "train/grad_norm",
    "train/grad_norm/trunk",
    "train/grad_norm/head_1",
    "train/grad_norm/head_2",
    "train/learning_rate",
    "throughput/tokens_per_second",
    "throughput/model_flops_per_second",
    "throughput/mfu",
    "throughput/data_wait_share",
    "memory/peak_bytes",
    "data/epochs/web",
}
VALIDATION_NAMES = {
    "validation/loss/head_1",
    "validation/loss/head_2",
    "validation/loss/total",
    "validation/accuracy/head_1",
    "validation/accuracy/head_2",
    "validation/bits_per_byte/head_1",
    "validation/bits_per_byte/head_2",
}


def train_step(
    step: int, tokens: int = 100, seconds: float = 0.5, heads: HeadMetrics = HEADS, ranks: Sequence[RankStats] = RANKS
) -> StepMetrics:
    norms = {"trunk": 0.5, "head_1": 0.3, "head_2": 0.2}
    return StepMetrics(step, heads, 0.7, norms, 3e-4, tokens, seconds, {"web": step / 8}, ranks)


class Recorder(MetricsWriter):
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.advanced: list[int] = []
        self.notes: list[str] = []
        self.closed: bool | None = None

    def advance(self, step: int) -> None:
        self.advanced.append(step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self.records.append((step, dict(scalars)))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self, failed: bool) -> None:
        self.closed = failed


def read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("reason", "failed"),
    [
        (StopReason.LAST_STEP, False),
        (StopReason.SIGNAL, False),
        (StopReason.SPIKE, True),
        (StopReason.SKIPS, True),
        (None, True),
    ],
)
def test_logs_the_steps_that_have_figures_of_the_ranks(reason: StopReason | None, failed: bool) -> None:
    writer = Recorder()
    logger = MetricsLogger([writer], RATES)
    for step in range(5, 14):
        logger.on_step(train_step(step, ranks=RANKS if step in (5, 9, 13) else ()))
    logger.on_end(reason)
    assert [step for step, _ in writer.records] == [5, 9, 13]
    assert writer.advanced == list(range(5, 14))
    assert writer.closed == failed


def test_rates_are_those_of_all_steps_since_the_last_line() -> None:
    writer = Recorder()
    logger = MetricsLogger([writer], RATES)
    for step, (tokens, seconds) in enumerate([(10, 9.0), (100, 1.0), (200, 4.0), (300, 5.0), (80, 1.0)], 1):
        logger.on_step(train_step(step, tokens, seconds, ranks=RANKS if step in (1, 4) else ()))
    logger.on_validation(5, None, HEADS)
    for step in (6, 7, 8):
        logger.on_step(train_step(step, 40, 1.0, ranks=RANKS if step == 8 else ()))
    training = {step: scalars for step, scalars in writer.records if "loss/total" in scalars}
    assert training[1]["throughput/tokens_per_second"] == 10 / 9
    assert training[4]["throughput/tokens_per_second"] == 600 / 10
    assert training[4]["throughput/model_flops_per_second"] == 60_000
    assert training[4]["throughput/mfu"] == 0.06
    assert training[8]["throughput/tokens_per_second"] == 200 / 4


def test_validation_sets_have_scalars_and_lengths_of_their_own() -> None:
    writer = Recorder()
    logger = MetricsLogger([writer], RATES)
    for name in (None, "web"):
        logger.on_validation(4, name, HEADS)
    (_, unnamed), (_, web) = writer.records
    assert set(unnamed) == VALIDATION_NAMES
    assert set(web) == {name.replace("validation/", "validation/web/") for name in VALIDATION_NAMES}
    assert web["validation/web/bits_per_byte/head_2"] == unnamed["validation/bits_per_byte/head_2"] / 2


def test_heads_that_do_not_run_cost_no_flops() -> None:
    writer = Recorder()
    logger = MetricsLogger([writer], RATES)
    one = HeadMetrics(losses=(1.0,), accuracies=(0.5,), total=1.0)
    for step, heads in enumerate([HEADS, HEADS, one, one], 1):
        logger.on_step(train_step(step, 40, 1.0, heads, () if step == 2 else RANKS))
    flops = [scalars["throughput/model_flops_per_second"] for _, scalars in writer.records]
    assert flops == [40_000, (40_000 + 20_000) / 2, 20_000]


def test_unknown_peak_gives_zero_mfu_and_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0)
    writer = Recorder()
    logger = MetricsLogger([writer], ThroughputUnits([500, 1_000], None, {}))
    logger.on_start(0)
    for step in (1, 2):
        logger.on_step(train_step(step))
    assert [scalars["throughput/mfu"] for _, scalars in writer.records] == [0, 0]
    assert capsys.readouterr().out.count("throughput/mfu") == 1
    MetricsLogger([Recorder()], RATES).on_start(0)
    assert capsys.readouterr().out == ""


def test_a_pipeline_has_the_memory_of_each_stage_and_its_bubble() -> None:
    writer = Recorder()
    logger = MetricsLogger([writer], RATES)
    of_stages = [(0, 0.3, 11), (0, 0.1, 12), (1, 0.4, 13), (1, 0.4, 10)]
    ranks = [RankStats(stage, 0.25 * stage, busy, 0.4, memory) for stage, busy, memory in of_stages]
    for step in (1, 2):
        logger.on_step(train_step(step, ranks=ranks if step == 2 else ()))
    [(_, scalars)] = writer.records
    assert scalars["memory/peak_bytes/stage_0"] == 12 and scalars["memory/peak_bytes/stage_1"] == 13
    assert scalars["memory/peak_bytes"] == 13
    assert scalars["throughput/pipeline_bubble"] == pytest.approx(1 - 0.3 / 0.4)
    assert scalars["throughput/data_wait_share"] == 0.25, "of two steps of half a second"
    logger.on_step(train_step(3))
    assert not any("stage" in name or "bubble" in name for name in writer.records[-1][1]), "one stage"


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0, rel=1e-15)
    assert bits_per_byte(math.log(2) * 6, 4.0) == pytest.approx(1.5, rel=1e-15)


def test_tensorboard_and_file_hold_the_same_scalars(tmp_path: Path) -> None:
    path, directory = tmp_path / "new" / "metrics.jsonl", tmp_path / "new" / "tensorboard"
    logger = MetricsLogger([MetricsFile(path), TensorBoardWriter(directory, [None])], RATES)
    logger.on_start(0)
    for step in range(1, 5):
        heads = HeadMetrics((1 / step, 2 / step), (step / 7, step / 9), 3 / step)
        logger.on_step(train_step(step, seconds=0.3 * step, heads=heads, ranks=() if step == 3 else RANKS))
    logger.on_validation(4, None, HEADS)
    logger.on_end(StopReason.LAST_STEP)

    *training, validation = read_lines(path)
    assert [set(line) - {"step"} for line in training] == [STEP_NAMES] * 3
    assert set(validation) - {"step"} == VALIDATION_NAMES
    assert [line["loss/head_1"] for line in training] == [1, 1 / 2, 1 / 4]  # full precision
    assert validation["validation/loss/head_2"] == math.log(2)
    assert validation["validation/bits_per_byte/head_2"] == 0.5

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == STEP_NAMES | VALIDATION_NAMES
    for name in sorted(STEP_NAMES | VALIDATION_NAMES):
        lines = [(line["step"], np.float32(line[name])) for line in [*training, validation] if name in line]
        assert [(event.step, np.float32(event.value)) for event in events.Scalars(name)] == lines, name


def test_the_heads_share_one_chart(tmp_path: Path) -> None:
    TensorBoardWriter(tmp_path, [None, "web"]).close(failed=False)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    encoded = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = layout_pb2.Layout.FromString(encoded).category[0].chart
    patterns = {chart.title: list(chart.multiline.tag) for chart in charts}
    assert patterns["loss of all heads"] == [r"^loss/head_\d+$"]
    assert patterns["validation/loss of all heads"] == [r"^validation/loss/head_\d+$"]
    assert patterns["validation/bits_per_byte of all heads"] == [r"^validation/bits_per_byte/head_\d+$"]


def test_each_line_is_there_at_once_and_a_restart_keeps_those_of_updates_made(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    killed = MetricsFile(path)  # never closed
    for step in (1, 2, 3):
        killed.write(step, step_scalars(train_step(step), ThroughputWindow(200, 200_000, 1.0), 1e6))
        assert [line["step"] for line in read_lines(path)] == list(range(1, step + 1))
    with path.open("a") as file:
        file.write('{"step": 2, "loss/he')
    resumed = MetricsFile(path, completed_steps=2)
    resumed.write(3, step_scalars(train_step(3), ThroughputWindow(100, 100_000, 1.0), 1e6))
    lines = read_lines(path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["throughput/tokens_per_second"] for line in lines] == [200.0, 200.0, 100.0]
    killed.close(failed=False)
    resumed.close(failed=False)


def test_a_diverged_run_leaves_valid_json(tmp_path: Path) -> None:
    writer = MetricsFile(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss/head_1": math.nan, "train/grad_norm": math.inf, "loss/total": 2.0})
    writer.close(failed=False)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"step": 1, "loss/head_1": None, "train/grad_norm": None, "loss/total": 2.0}


@contextmanager
def no_room(free: int = 0) -> Iterator[None]:
    """Files that are larger than that many bytes do not grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_told_once_and_nothing_is_lost_of_the_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(0)
    path, seen, before = tmp_path / "metrics.jsonl", Recorder(), set(threading.enumerate())
    logger = MetricsLogger([MetricsFile(path), TensorBoardWriter(tmp_path / "tensorboard", [None]), seen], RATES)
    logger.on_step(train_step(1))
    with no_room(path.stat().st_size + 5):
        for step in range(2, 5):
            logger.on_step(train_step(step))
            logger.note("still here")
        while any(thread.is_alive() for thread in set(threading.enumerate()) - before):
            time.sleep(0.01)  # TensorBoard's thread ends when it cannot write
        logger.on_step(train_step(5))
    assert path.read_text().count("\n") < 5
    logger.on_step(train_step(6))
    logger.on_end(StopReason.LAST_STEP)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5, 6] == [step for step, _ in seen.records]
    warnings = capsys.readouterr().err.splitlines()
    assert [warning.partition(" cannot")[0] for warning in warnings] == [
        "warning: metrics.jsonl",
        "warning: TensorBoard's file",
    ]


def test_events_survive_a_full_disk_and_an_incomplete_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, shown = tmp_path / "events.jsonl", list[str]()

    def record(text: str) -> None:
        logging.getLogger("mtp_dist.test").info(text, extra={"event": "note"})

    def start() -> None:
        configure_logging(0)
        PACKAGE_LOGGER.addHandler(EventsHandler(path, 0, shown.append))

    start()
    record("started")
    with path.open("a") as file:
        file.write('{"time": "20')
    start()
    record("resumed")
    with no_room(path.stat().st_size + 5):
        record("lost")
        record("lost")
    record("there is room again")
    assert [line["text"] for line in read_lines(path)] == ["started", "resumed", "there is room again"]
    assert shown == ["started", "resumed", "lost", "lost", "there is room again"]
    output = capsys.readouterr()
    assert output.out.splitlines() == shown
    assert output.err.count("events.jsonl cannot be written, training continues") == 1


def test_a_note_has_its_step_and_none_comes_after_the_end(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, [None], 3)
    writer.advance(4)
    writer.note("a note")
    writer.close(failed=False)
    writer.note("too late")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Tensors("note/text_summary")] == [4]
    assert len(list(tmp_path.iterdir())) == 1
