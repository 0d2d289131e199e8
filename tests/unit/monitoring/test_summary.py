"""The end of a run as people and as programs read it."""

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from mtp_dist.metrics import HeadMetrics
from mtp_dist.monitoring.summary import RunSummary, ValidationResult, print_summary, write_summary

HEADS = HeadMetrics(losses=(1.5, 2.25), accuracies=(0.5, 0.25), total=3.75)
SUMMARY = RunSummary(
    name="demo",
    steps=1200,
    tokens_per_second=12345.6,
    output_dir=Path("runs/demo"),
    validation=[ValidationResult(None, HEADS, unigram_entropy=3.0, bytes_per_token=2.0)],
    sample="def f(x):\n\treturn [x]\x1b[31m\x07",
    tensorboard_dir=Path("runs/my demo/tensorboard"),
    checkpoint=Path("runs/demo/checkpoints/step_1200"),
)


def printed(summary: RunSummary) -> str:
    output = io.StringIO()
    print_summary(summary, Console(file=output, width=80))
    return output.getvalue()


def test_every_fact_is_shown_within_80_columns_without_control_codes() -> None:
    text = printed(SUMMARY)
    assert max(map(len, text.splitlines())) <= 80
    assert all(c.isprintable() or c == "\n" for c in text)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["1", "1.5000", "1.0820", "50.0%", "50.0%"] in rows
    assert ["2", "2.2500", "1.6230", "25.0%", "25.0%"] in rows
    assert ["unigram entropy", "3.0000", "2.1640", "", ""] in rows
    assert "return [x]\N{REPLACEMENT CHARACTER}[31m" in text
    for fact in ("1,200", "12,346", "runs/demo/checkpoints/step_1200", "tensorboard --logdir 'runs/my demo/tensorb"):
        assert fact in text


def test_a_long_path_stays_in_one_piece() -> None:
    path = Path("/scratch") / ("x" * 100)
    assert f"tensorboard --logdir {path}\n" in printed(dataclasses.replace(SUMMARY, tensorboard_dir=path))


def test_what_a_run_does_not_have_is_left_out() -> None:
    text = printed(RunSummary("demo", 10, 5.0, Path("runs/demo")))
    assert [line.split(":")[0] for line in text.splitlines()] == ["Steps", "Tokens per second", "Run folder"]


def test_the_file_holds_all_numbers_in_full_precision(tmp_path: Path) -> None:
    summary = dataclasses.replace(SUMMARY, output_dir=tmp_path / "run")
    path = write_summary(summary)
    assert path == tmp_path / "run" / "summary.json"
    record = json.loads(path.read_text())
    assert (record["name"], record["steps"], record["tokens_per_second"]) == ("demo", 1200, 12345.6)
    [validation] = record["validation"]
    assert [head["head"] for head in validation["heads"]] == [1, 2]
    assert [head["loss"] for head in validation["heads"]] == [1.5, 2.25]
    assert [head["accuracy"] for head in validation["heads"]] == [0.5, 0.25]
    assert validation["heads"][1]["bits_per_byte"] == pytest.approx(2.25 / math.log(2) / 2, rel=1e-15)
    assert (validation["total"], validation["unigram_entropy"], validation["bytes_per_token"]) == (3.75, 3.0, 2.0)
    assert validation["unigram_bits_per_byte"] == pytest.approx(3 / math.log(2) / 2, rel=1e-15)
    assert record["sample"] == SUMMARY.sample
    assert record["checkpoint"] == "runs/demo/checkpoints/step_1200"
    assert record["tensorboard_dir"] == "runs/my demo/tensorboard"


def test_absent_and_diverged_values_are_null(tmp_path: Path) -> None:
    bare = json.loads(write_summary(RunSummary("demo", 10, 5.0, tmp_path)).read_text())
    assert bare["validation"] == [] and bare["checkpoint"] is bare["tensorboard_dir"] is bare["sample"] is None
    diverged = ValidationResult("web", HeadMetrics((math.nan,), (0.0,), math.nan), 3.0, 1.0)
    record = json.loads(write_summary(RunSummary("demo", 10, 5.0, tmp_path, [diverged])).read_text())
    assert record["validation"][0]["heads"][0]["loss"] is record["validation"][0]["total"] is None
    assert record["validation"][0]["name"] == "web"
