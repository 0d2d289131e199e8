"""A tiny head-loss benchmark has all results; an invalid option ends with one message."""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

from mtp_dist.bench.head_loss.baselines import BASELINES
from mtp_dist.bench.head_loss.measurement import measure_on_rank
from mtp_dist.bench.head_loss.settings import Settings, read_settings
from mtp_dist.cli import app
from mtp_dist.cli.progress import head_loss_progress
from mtp_dist.cli.tables import head_loss_table
from tests.integration import jobs

TINY = ["--device", "cpu", "--tokens", "64", "--hidden", "32", "--vocab", "300", "--heads", "1,2"]
ROW_KEYS = set(
    "mode heads seconds seconds_by_round seconds_relative_to_naive peak_bytes collectives collective_bytes flops "
    "gradient_error fraction_of_matmul_rate".split()
)


def check_rows(result, modes, largest_error):
    assert set(result) == {"machine", "settings", "matmul_flops_per_second", "rows"}
    assert result["matmul_flops_per_second"] > 0
    assert [(row["heads"], row["mode"]) for row in result["rows"]] == [(n, mode) for n in (1, 2) for mode in modes]
    for row in result["rows"]:
        assert set(row) == ROW_KEYS
        assert row["seconds"] in row["seconds_by_round"]
        assert row["flops"] == 6 * 64 * 32 * 300 * row["heads"]
        assert min(row["seconds"], row["seconds_relative_to_naive"], row["peak_bytes"]) > 0, row
        assert row["fraction_of_matmul_rate"] > 0, row
        assert 0 < row["gradient_error"] <= largest_error, row


def peaks(result, mode):
    return [row["peak_bytes"] for row in result["rows"] if row["mode"] == mode]


def head_loss(dtype, modes=None):
    """On each rank: run a tiny benchmark, by default of all modes that run on a CPU and compile nothing."""
    settings = read_settings("2,1", 1, modes, "cpu", tokens=64, hidden=32, vocab=300, dtype=dtype)
    return measure_on_rank(settings, head_loss_progress)


def head_loss_without_memory_for_pytorch():
    """On each rank: run it with a PyTorch baseline that allocates more memory than there is."""
    with patch.dict(BASELINES, pytorch=replace(BASELINES["pytorch"], loss=lambda *_: torch.empty(2**50))):
        return head_loss("fp32", "naive,eager,pytorch")


@pytest.mark.parametrize(("dtype", "largest_error"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_one_rank(ranks, dtype, largest_error):
    [result] = ranks.run(1, head_loss, dtype)
    check_rows(result, ["naive", "eager", "recompute", "pytorch"], largest_error)
    assert all(row["collectives"] == row["collective_bytes"] == 0 for row in result["rows"])
    one, two = peaks(result, "eager")
    # One more head adds the gradient of its norm, a number per head and nothing else.
    assert two - one <= 32 * 4 + 256
    one, two = peaks(result, "naive")
    assert two - one >= 64 * 300 * 4
    assert head_loss_table(result).row_count == 8


def test_mode_without_enough_memory(ranks):
    [result] = ranks.run(1, head_loss_without_memory_for_pytorch)
    check_rows(result | {"rows": [row for row in result["rows"] if row["mode"] == "eager"]}, ["eager"], 1e-6)
    failed = [row for row in result["rows"] if row["mode"] == "pytorch"]
    assert [row["heads"] for row in failed] == [1, 2]
    measured = ROW_KEYS - {"mode", "heads", "flops"}
    assert all(row[key] is None for row in failed for key in measured)
    assert head_loss_table(result).row_count == 6


def test_command_with_two_ranks():
    run = jobs.run(jobs.plain("-m", "mtp_dist.cli", "bench", "head-loss", *TINY, "--tp", "2", "--json"))
    assert run.status == 0, run.stderr
    result = json.loads(run.stdout)
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
    assert result.exit_code == 2
    assert result.stdout == ""
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu():
    assert "no GPU" in error_of("--device", "cuda")


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "--tp 2 needs 2 GPUs, this machine has 1" in error_of("--device", "cuda", "--tp", "2")


def test_flops_of_three_matmuls():
    settings = Settings(tokens=2, hidden=3, vocab=5, heads=(1,), tp=1, dtype="fp32", modes=("eager",), device="cpu")
    assert settings.flops_per_head == 3 * (2 * 2 * 3 * 5)
