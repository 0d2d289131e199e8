"""A tiny head-loss benchmark has all results; an invalid option ends with one message."""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

from mtp_dist.bench.head_loss.baselines import BASELINES
from mtp_dist.bench.head_loss.measurement import measure_on_rank
from mtp_dist.bench.head_loss.settings import read_settings
from mtp_dist.cli import app
from mtp_dist.cli.progress import bench_progress
from mtp_dist.cli.tables import head_loss_table
from tests.integration import jobs

TINY = ["--device", "cpu", "--tokens", "64", "--hidden", "32", "--vocab", "300", "--heads", "1,2"]
MEASURED = "seconds seconds_by_round seconds_relative_to_naive peak_bytes collectives collective_bytes gradient_error"
MEASURED = {*MEASURED.split(), "fraction_of_matmul_rate"}


def check_rows(result, modes, largest_error):
    assert set(result) == {"machine", "settings", "matmul_flops_per_second", "rows"}
    assert result["matmul_flops_per_second"] > 0
    assert [(row["heads"], row["mode"]) for row in result["rows"]] == [(n, mode) for n in (1, 2) for mode in modes]
    for row in result["rows"]:
        assert set(row) == MEASURED | {"mode", "heads", "flops"}
        assert row["seconds"] in row["seconds_by_round"]
        assert row["flops"] == 3 * (2 * 64 * 32 * 300) * row["heads"], "three matmuls"
        positive = ("seconds", "seconds_relative_to_naive", "peak_bytes", "fraction_of_matmul_rate", "gradient_error")
        assert min(row[name] for name in positive) > 0 and row["gradient_error"] <= largest_error, row


def head_loss(dtype, modes=None):
    """On each rank: run a tiny benchmark, by default of all modes that run on a CPU and compile nothing."""
    settings = read_settings("2,1", 1, modes, "cpu", tokens=64, hidden=32, vocab=300, dtype=dtype)
    return measure_on_rank(settings, bench_progress)


def head_loss_without_memory_for_pytorch():
    """On each rank: run it with a PyTorch baseline that allocates more memory than there is."""
    with patch.dict(BASELINES, pytorch=replace(BASELINES["pytorch"], loss=lambda *_: torch.empty(2**50))):
        return head_loss("fp32", "naive,eager,pytorch")


@pytest.mark.parametrize(("dtype", "largest_error"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_one_rank(ranks, dtype, largest_error):
    [result] = ranks.run(1, head_loss, dtype)
    check_rows(result, ["naive", "eager", "recompute", "pytorch"], largest_error)
    assert all(row["collectives"] == row["collective_bytes"] == 0 for row in result["rows"])
    peaks = {(row["mode"], row["heads"]): row["peak_bytes"] for row in result["rows"]}
    # One more head adds the gradient of its norm, a number per head and nothing else.
    assert peaks["eager", 2] - peaks["eager", 1] <= 32 * 4 + 256
    assert peaks["naive", 2] - peaks["naive", 1] >= 64 * 300 * 4
    assert head_loss_table(result).row_count == 8


def test_mode_without_enough_memory(ranks):
    [result] = ranks.run(1, head_loss_without_memory_for_pytorch)
    check_rows(result | {"rows": [row for row in result["rows"] if row["mode"] == "eager"]}, ["eager"], 1e-6)
    failed = [row for row in result["rows"] if row["mode"] == "pytorch"]
    assert [row["heads"] for row in failed] == [1, 2] and head_loss_table(result).row_count == 6
    assert all(row[key] is None for row in failed for key in MEASURED)


def test_command_with_two_ranks():
    run = jobs.run(jobs.plain("-m", "mtp_dist.cli", "bench", "head-loss", *TINY, "--tp", "2", "--json"), status=0)
    result = json.loads(run.stdout)
    assert result.pop("measured")["cores"] > 0
    check_rows(result, ["naive", "eager", "recompute"], 1e-6)
    assert all(row["collective_bytes"] > 0 for row in result["rows"])
    collectives = {(row["mode"], row["heads"]): row["collectives"] for row in result["rows"]}
    # Eager: one exchange for the softmax and one sum of the hidden states' gradient.
    assert [collectives["eager", n] for n in (1, 2)] == [2, 4]
    assert [collectives["recompute", n] for n in (1, 2)] == [3, 6]
    assert run.stderr.count("n = 2, recompute") == 1, run.stderr


ERRORS = """
--heads 0 => --heads 0 ... above 0
--heads 1,x => --heads 1,x
--modes eager,fast => fast is not known ... eager ... cut-cross-entropy
--modes liger => liger needs
--modes pytorch --tp 2 => pytorch needs --tp 1
--tokens 0 => --tokens 0
--tp 0 => --tp 0
--vocab 1 => --vocab 1
--hidden 32 --tp 3 => --hidden 32 ... 2 * tp = 6
--dtype fp16 => --dtype fp16 ... fp32 or bf16
--device tpu => --device tpu ... auto, cpu or cuda
"""


def error_of(*options):
    result = CliRunner().invoke(app, ["bench", "head-loss", *TINY, *options])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("case", ERRORS.strip().split("\n"))
def test_error_names_option_and_remedy(case):
    options, expected = case.split(" => ")
    message = error_of(*options.split())
    assert all(fragment in message for fragment in expected.split(" ... ")), message


def test_inside_another_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE" in error_of("--tp", "2")


@pytest.mark.parametrize("gpus", [0, 1])
def test_more_ranks_than_gpus(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    message = error_of("--device", "cuda", "--tp", "2")
    assert ("--tp 2 needs 2 GPUs, this machine has 1" if gpus else "no GPU") in message
