"""The result of a run, printed and in `summary.json`."""

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from mtp_dist.data.datasets import ValidationSet
from mtp_dist.metrics import HeadMetrics
from mtp_dist.monitoring.summary import RunSummary, print_summary, write_summary

HEADS = HeadMetrics(losses=(1.5, 2.25), accuracies=(0.5, 0.25), total=3.75, draft_acceptance_rates=(0.75,))
SUMMARY = RunSummary(
    name="demo",
    steps=1200,
    tokens_per_second=12345.6,
    output_dir=Path("runs/demo"),
    validation=[(ValidationSet(None, (), unigram_entropy=3.0, bytes_per_token=2.0), HEADS)],
    sample="def f(x):\n\treturn [x]\x1b[31m\x07",
    tensorboard_dir=Path("runs/my demo/tensorboard"),
    checkpoint=Path("runs/demo/checkpoints/step_1200"),
)


def printed(summary):
    output = io.StringIO()
    print_summary(summary, Console(file=output, width=80))
    return output.getvalue()


def test_result_is_printed_within_80_columns_without_control_codes():
    text = printed(SUMMARY)
    assert max(map(len, text.splitlines())) <= 80
    assert all(c.isprintable() or c == "\n" for c in text)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["1", "1.5000", "1.0820", "50.0%", "50.0%"] in rows
    assert ["2", "2.2500", "1.6230", "25.0%", "25.0%"] in rows
    assert ["unigram entropy", "3.0000", "2.1640", "", ""] in rows
    assert "return [x]\N{REPLACEMENT CHARACTER}[31m" in text
    assert "1.75 tokens per forward pass with all heads' drafts\n" in re.sub(" +\n", "\n", text)
    upper_estimate = printed(dataclasses.replace(SUMMARY, upper_estimate=True))
    assert "1.75 tokens per forward pass with all heads' drafts (upper estimate)" in " ".join(upper_estimate.split())
    for fact in ("1,200", "12,346", "runs/demo/checkpoints/step_1200", "tensorboard --logdir 'runs/my demo/tensorb"):
        assert fact in text
    path = Path("/scratch") / ("x" * 100)
    assert f"tensorboard --logdir {path}\n" in printed(dataclasses.replace(SUMMARY, tensorboard_dir=path)), "one piece"
    bare = printed(RunSummary("demo", 10, 5.0, Path("runs/demo")))
    assert [line.split(":")[0] for line in bare.splitlines()] == ["Steps", "Tokens per second", "Run folder"]


def test_file_contains_all_numbers_in_full_precision(tmp_path):
    path = write_summary(dataclasses.replace(SUMMARY, output_dir=tmp_path / "run"))
    assert path == tmp_path / "run" / "summary.json"
    record = json.loads(path.read_text())
    [validation] = record.pop("validation")
    numbers = {"name": "demo", "steps": 1200, "tokens_per_second": 12345.6, "sample": SUMMARY.sample}
    folders = {"tensorboard_dir": "runs/my demo/tensorboard", "checkpoint": "runs/demo/checkpoints/step_1200"}
    assert record == numbers | folders | {"output_dir": str(tmp_path / "run")}
    heads = [(head["head"], head["loss"], head["accuracy"]) for head in validation["heads"]]
    assert heads == [(1, 1.5, 0.5), (2, 2.25, 0.25)]
    assert validation["heads"][1]["bits_per_byte"] == pytest.approx(2.25 / math.log(2) / 2, rel=1e-15)
    assert (validation["total"], validation["unigram_entropy"], validation["bytes_per_token"]) == (3.75, 3.0, 2.0)
    assert (validation["draft_acceptance_rate_pos_2"], validation["expected_tokens_per_forward"]) == (0.75, 1.75)
    assert validation["unigram_bits_per_byte"] == pytest.approx(3 / math.log(2) / 2, rel=1e-15)


def test_absent_and_diverged_values_are_null(tmp_path):
    bare = json.loads(write_summary(RunSummary("demo", 10, 5.0, tmp_path)).read_text())
    assert bare["validation"] == [] and bare["checkpoint"] is bare["tensorboard_dir"] is bare["sample"] is None
    diverged = (ValidationSet("web", (), 3.0, 1.0), HeadMetrics((math.nan,), (0.0,), math.nan))
    summary = RunSummary("demo", 10, 5.0, tmp_path, [diverged])
    [validation] = json.loads(write_summary(summary).read_text())["validation"]
    assert validation["heads"][0]["loss"] is validation["total"] is None and validation["name"] == "web"
