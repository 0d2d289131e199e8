"""Checkpoints and exports of earlier versions open; those of later versions are refused with the reason."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist.checkpoint.format import read_metadata
from mtp_dist.checkpoint.manifest import check_fully
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.config.migration import VERSION, saved_config
from mtp_dist.convert.saved_heads import SavedHeads
from mtp_dist.errors import CheckpointError
from tests.integration import jobs
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.checkpoint.folders import config_in, copied, edit_json, write_checkpoint
from tests.unit.checkpoint.on_ranks import run_program, train_part

FIRST = Path(__file__).parents[2] / "fixtures" / "9e30c7b"
"""The first version: see the README next to it."""
STEP = 2
CHECKPOINT = FIRST / "fp32" / f"step_{STEP:08d}"


def train_in(folder: Path, *overrides: str) -> list[list[float]]:
    """Train and return the losses of both heads in each step."""
    with contextlib.chdir(folder):
        run_program(FIRST / "run.yaml", *overrides)
    rows = jobs.metrics(folder / "out")
    return [[row["loss/head_1"], row["loss/head_2"]] for row in rows if "loss/head_1" in row]


RUNS = {"fp32": (1, [], 1e-5), "bf16": (2, ["train.precision=bf16", "parallel.zero_stage=1"], 1e-3)}
"""Processes, overrides and largest relative error of the losses."""


@pytest.mark.parametrize("saved", RUNS)
def test_run_of_the_first_version_is_resumed(ranks: Ranks, tmp_path: Path, saved: str) -> None:
    processes, overrides, largest_error = RUNS[saved]
    jobs.write_corpus(tmp_path / "corpus")
    folder = FIRST / saved / f"step_{STEP:08d}"
    check_fully(folder)
    found, *_ = ranks.run(processes, train_in, tmp_path, f"checkpoint.resume={folder}", *overrides)
    expected = json.loads((FIRST / "losses.json").read_text())[saved]
    assert len(found) == len(expected) == 2
    torch.testing.assert_close(torch.tensor(found), torch.tensor([*expected.values()]), rtol=largest_error, atol=0)


def test_export_of_the_first_version_is_opened() -> None:
    config, weights = load_weights(CHECKPOINT)
    heads = SavedHeads(FIRST / "export")
    assert heads.config == config and config.vocab_size == 257
    assert heads.names == {name for name in weights if name.startswith("heads.2.")} and len(heads.names) == 6
    assert all(torch.equal(heads.read(name, tuple(weights[name].shape)), weights[name]) for name in heads.names)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> tuple[Path, Path]:
    """Return copies of the first version's checkpoint and export with another configuration."""
    checkpoint, export = copied(CHECKPOINT, folder / "checkpoint"), copied(FIRST / "export", folder / "export")
    edit_json(checkpoint / "config.json", change)
    edit_json(export / "mtp_config.json", change)
    return checkpoint, export


@pytest.mark.parametrize(("given", "becomes"), [("bf16", "bf16"), ("bfp16", "bf16"), ("fp32", "fp32"), (None, "fp32")])
def test_renamed_key_is_migrated(tmp_path: Path, given: str | None, becomes: str) -> None:
    def change(values: dict[str, Any]) -> None:
        values["config"]["deepspeed"] = {"wall_clock_breakdown": True}
        values["config"]["train"]["precision"] = "bf16"
        if given:
            values["config"]["deepspeed"]["communication_data_type"] = given

    checkpoint, export = changed(tmp_path, change)
    for config in (load_weights(checkpoint)[0], SavedHeads(export).config):
        assert config is not None and config.parallel.grad_reduce_dtype == becomes
        assert config.deepspeed == {"wall_clock_breakdown": True}


def test_settings_that_are_refused_today_still_open(tmp_path: Path) -> None:
    """Incompatible settings are checked when a run starts, and more of them from version to version."""
    checkpoint, export = changed(tmp_path, lambda values: values["config"]["parallel"].update(sequence=True, tensor=1))
    config, weights = load_weights(checkpoint)
    assert config.parallel.sequence and weights and SavedHeads(export).config


def test_counts_above_a_later_limit_are_lowered() -> None:
    values = tiny_config().model_dump(mode="json")
    values["checkpoint"]["every"], values["run"]["seed"], values["model"]["rope_theta"] = 10**10, 2**60, 1e10
    config = saved_config({"config": values, "vocab_size": 131})
    assert (config.checkpoint.every, config.run.seed, config.model.rope_theta) == (2**31 - 1, 2**60, 1e10)


def test_newer_version_is_reported_and_not_called_corrupt(tmp_path: Path) -> None:
    checkpoint, export = changed(tmp_path, lambda values: values.update(config_version=99))
    for read, folder in ((read_metadata, checkpoint), (SavedHeads, export)):
        with pytest.raises(CheckpointError, match=r"version 99, .* up to version \d: install a newer one") as error:
            read(folder)
        assert "corrupt" not in str(error.value)


def test_moments_that_the_index_lacks_start_from_zero(ranks: Ranks, tmp_path: Path) -> None:
    frozen = ("exp_avg.embedding.weight", "exp_avg_sq.embedding.weight")
    folder = write_checkpoint(tmp_path / "saved", 10)
    assert json.loads((folder / "config.json").read_text())["config_version"] == VERSION > 1
    index = folder / "optimizer.safetensors.index.json"
    edit_json(index, lambda values: [values["weight_map"].pop(moment) for moment in frozen])
    check_fully(folder)
    [part] = ranks.run(1, train_part, config_in(tmp_path), 10, 10, folder, False)
    for name, moment in part.moments.items():
        assert torch.equal(moment, torch.full_like(moment, 0.0 if name in frozen else 10.5)), name
    assert all(torch.equal(weight, torch.full_like(weight, 10.5)) for weight in part.weights.values())
