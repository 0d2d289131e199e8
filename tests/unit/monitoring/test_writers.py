"""Files of the metrics writers, read back, and what a restart, a rollback and a full disk do to them."""

import json
import math
import resource
import threading
import time
from contextlib import contextmanager
from unittest.mock import Mock

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from mtp_dist.metrics import HeadMetrics
from mtp_dist.monitoring.callback import StopReason
from mtp_dist.monitoring.metrics_logger import MetricsLogger
from mtp_dist.monitoring.writers.jsonl import JsonlWriter
from mtp_dist.monitoring.writers.tensorboard import TensorBoardWriter
from mtp_dist.monitoring.writers.writer import MetricsWriter
from tests.unit.monitoring.test_metrics_logger import HEADS, RANKS, STEP_NAMES, UNITS, VALIDATION_NAMES, step_metrics


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_tensorboard(directory):
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_tensorboard_and_file_contain_the_same_scalars(tmp_path):
    path, directory = tmp_path / "new" / "metrics.jsonl", tmp_path / "new" / "tensorboard"
    tensorboard = TensorBoardWriter(directory, [None, "web"])
    logger = MetricsLogger([JsonlWriter(path), tensorboard], UNITS, {"config": {"a": 1}, "device": "abacus"})
    logger.on_start(0)
    for step in range(1, 5):
        heads = HeadMetrics((1 / step, 2 / step), (step / 7, step / 9), 3 / step)
        logger.on_step(step_metrics(step, seconds=0.3 * step, heads=heads, ranks=() if step == 3 else RANKS))
    logger.on_validation(4, None, HEADS)
    logger.note("a note")
    logger.on_end(StopReason.LAST_STEP)
    tensorboard.note("too late: it would open another file")
    assert len(list(directory.iterdir())) == 1

    *training, validation = read_lines(path)
    assert [set(line) - {"step"} for line in training] == [STEP_NAMES] * 3
    assert set(validation) - {"step"} == VALIDATION_NAMES
    assert [line["loss/head_1"] for line in training] == [1, 1 / 2, 1 / 4]  # full precision
    assert validation["validation/loss/head_2"] == math.log(2)
    assert validation["validation/bits_per_byte/head_2"] == 0.5

    events = read_tensorboard(directory)
    assert set(events.Tags()["scalars"]) == STEP_NAMES | VALIDATION_NAMES
    for name in sorted(STEP_NAMES | VALIDATION_NAMES):
        lines = [(line["step"], np.float32(line[name])) for line in [*training, validation] if name in line]
        assert [(event.step, np.float32(event.value)) for event in events.Scalars(name)] == lines, name
    texts = {"configuration": (0, "```yaml\na: 1\n```"), "run": (0, "```yaml\ndevice: abacus\n```")}
    for tag, expected in (texts | {"note": (4, "a note")}).items():
        [text] = events.Tensors(f"{tag}/text_summary")
        assert (text.step, text.tensor_proto.string_val[0].decode()) == expected
    encoded = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = layout_pb2.Layout.FromString(encoded).category[0].chart
    patterns = {chart.title: list(chart.multiline.tag) for chart in charts}
    for metric in ("loss", "validation/loss", "validation/web/bits_per_byte"):
        assert patterns[f"{metric} of all heads"] == [rf"^{metric}/head_\d+$"]
    title = "validation/web: drafts accepted up to each distance"
    assert patterns[title] == [r"^validation/web/draft_acceptance_rate_pos_\d+$"]


@pytest.mark.parametrize("restart", ["killed", "rolled back"])
def test_repeated_steps_are_dropped(tmp_path, restart):
    path, directory = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    writers = [JsonlWriter(path), TensorBoardWriter(directory, [None])]
    for step in (1, 2, 3):
        for writer in writers:
            writer.write(step, {"loss/head_1": float(step)})
        assert [line["step"] for line in read_lines(path)] == list(range(1, step + 1)), "each line is there at once"
    resumed = writers
    if restart == "killed":
        path.write_text(path.read_text() + '{"step": 2, "loss/he')
        resumed = [JsonlWriter(path, completed_steps=2), TensorBoardWriter(directory, [None], completed_steps=2)]
    for writer in resumed:
        if restart == "rolled back":
            writer.rewind(2)
        writer.write(3, {"loss/head_1": 7.0})
    for writer in {*writers, *resumed}:
        writer.close(failed=False)
    lines = [(line["step"], line["loss/head_1"]) for line in read_lines(path)]
    events = [(event.step, event.value) for event in read_tensorboard(directory).Scalars("loss/head_1")]
    assert lines == events == [(1, 1.0), (2, 2.0), (3, 7.0)]


def test_diverged_run_leaves_valid_json(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss/head_1": math.nan, "train/grad_norm": math.inf, "loss/total": 2.0})
    writer.close(failed=False)
    [line] = read_lines(tmp_path / "metrics.jsonl")  # Python's JSON would read a NaN as such
    assert line == {"step": 1, "loss/head_1": None, "train/grad_norm": None, "loss/total": 2.0}


@contextmanager
def full_disk(file_size):
    """Let no file grow above that many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_is_reported_once_and_no_line_is_lost(tmp_path, caplog):
    path, seen, before = tmp_path / "metrics.jsonl", Mock(MetricsWriter), set(threading.enumerate())
    logger = MetricsLogger([JsonlWriter(path), TensorBoardWriter(tmp_path / "tensorboard", [None]), seen], UNITS, {})
    logger.on_step(step_metrics(1))
    with full_disk(path.stat().st_size + 5):
        for step in range(2, 5):
            logger.on_step(step_metrics(step))
            logger.note("still here")
        while any(thread.is_alive() for thread in set(threading.enumerate()) - before):
            time.sleep(0.01)  # TensorBoard's thread ends when it cannot write
        logger.on_step(step_metrics(5))
    assert path.read_text().count("\n") < 5
    logger.on_step(step_metrics(6))
    logger.on_end(StopReason.LAST_STEP)
    seen_steps = [call.args[0] for call in seen.write.call_args_list]
    assert [line["step"] for line in read_lines(path)] == seen_steps == [1, 2, 3, 4, 5, 6]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warning.partition(" cannot")[0] for warning in warnings] == ["metrics.jsonl", "TensorBoard's file"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_rollback_on_a_full_disk_is_survived(tmp_path, caplog):
    path, seen = tmp_path / "metrics.jsonl", Mock(MetricsWriter)
    logger = MetricsLogger([JsonlWriter(path), TensorBoardWriter(tmp_path / "tensorboard", [None]), seen], UNITS, {})
    for step in (1, 2):
        logger.on_step(step_metrics(step))
    with full_disk(5):
        logger.on_rollback(1)
    logger.on_step(step_metrics(2))
    logger.on_end(StopReason.LAST_STEP)
    seen_steps = [call.args[0] for call in seen.write.call_args_list]
    assert [line["step"] for line in read_lines(path)] == seen_steps == [1, 2, 2]
    assert "metrics.jsonl cannot be written, training continues" in caplog.text
