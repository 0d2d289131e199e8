"""Checkpoints and exports of earlier versions open, and those of later ones are refused with the reason."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_dist.checkpoint.format import read_metadata
from mtp_dist.checkpoint.manifest import check_fully, record_of
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.convert.saved_heads import SavedHeads
from mtp_dist.errors import ConfigError
from tests.integration.jobs import write_corpus
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.checkpoint.folders import config_in, write_checkpoint
from tests.unit.checkpoint.on_ranks import train_part

FIRST = Path(__file__).parents[2] / "fixtures" / "9e30c7b"
"""The first version: see the README beside it."""
STEP = 2


def train_in(folder: Path, *overrides: str) -> list[list[float]]:
    """Losses of both heads in each update."""
    from mtp_dist.pretrain import main

    with contextlib.chdir(folder):
        try:
            main(["--config", str(FIRST / "run.yaml"), *overrides])
        except SystemExit as end:
            assert not end.code
        rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    return [[row["loss/head_1"], row["loss/head_2"]] for row in rows if "loss/head_1" in row]


@pytest.mark.parametrize(
    ("saved", "processes", "overrides", "largest_error"),
    [("fp32", 1, [], 1e-5), ("bf16", 2, ["train.precision=bf16", "parallel.zero_stage=1"], 1e-3)],
)
def test_a_run_of_the_first_version_is_resumed(
    ranks: Ranks, tmp_path: Path, saved: str, processes: int, overrides: list[str], largest_error: float
) -> None:
    write_corpus(tmp_path / "corpus")
    folder = FIRST / saved / f"step_{STEP:08d}"
    check_fully(folder)
    found, *_ = ranks.run(processes, train_in, tmp_path, f"checkpoint.resume={folder}", *overrides)
    expected = json.loads((FIRST / "losses.json").read_text())[saved]
    assert len(found) == len(expected) == 2
    torch.testing.assert_close(torch.tensor(found), torch.tensor([*expected.values()]), rtol=largest_error, atol=0)


def test_an_export_of_the_first_version_is_opened() -> None:
    config, weights = load_weights(FIRST / "fp32" / f"step_{STEP:08d}")
    heads = SavedHeads(FIRST / "export")
    assert heads.config == config and config.vocab_size == 257
    assert heads.names == {name for name in weights if name.startswith("heads.2.")} and len(heads.names) == 6
    assert all(torch.equal(heads.read(name, tuple(weights[name].shape)), weights[name]) for name in heads.names)


def changed(folder: Path, target: Path, change: Callable[[dict[str, Any]], object], file: str = "config.json") -> Path:
    """A copy with another JSON file, and a manifest that agrees."""
    shutil.copytree(folder, target)
    values = json.loads((target / file).read_text())
    change(values)
    (target / file).write_text(json.dumps(values))
    if (target / "manifest.json").exists():
        manifest = json.loads((target / "manifest.json").read_text())
        record = record_of(target / file)
        manifest["files"][file] = {"bytes": record.bytes, "sha256": record.sha256}
        (target / "manifest.json").write_text(json.dumps(manifest))
    return target


@pytest.mark.parametrize(("given", "becomes"), [("bf16", "bf16"), ("bfp16", "bf16"), ("fp32", "fp32"), (None, "fp32")])
def test_a_key_that_has_moved_is_found_at_its_new_place(tmp_path: Path, given: str | None, becomes: str) -> None:
    def change(values: dict[str, Any]) -> None:
        values["config"]["deepspeed"] = {"wall_clock_breakdown": True}
        values["config"]["train"]["precision"] = "bf16"
        if given:
            values["config"]["deepspeed"]["communication_data_type"] = given

    checkpoint = changed(FIRST / "bf16" / f"step_{STEP:08d}", tmp_path / "checkpoint", change)
    export = changed(FIRST / "export", tmp_path / "export", change, "mtp_config.json")
    for config in (load_weights(checkpoint)[0], SavedHeads(export).config):
        assert config is not None and config.parallel.grad_reduce_dtype == becomes
        assert config.deepspeed == {"wall_clock_breakdown": True}


def test_settings_that_are_refused_today_are_no_reason_not_to_open(tmp_path: Path) -> None:
    """What must not be combined is checked when a run starts, and more of it from version to version."""

    def change(values: dict[str, Any]) -> None:
        values["config"]["parallel"] |= {"sequence": True, "tensor": 1}

    config, weights = load_weights(changed(FIRST / "fp32" / f"step_{STEP:08d}", tmp_path / "checkpoint", change))
    assert config.parallel.sequence and weights
    assert SavedHeads(changed(FIRST / "export", tmp_path / "export", change, "mtp_config.json")).config


def test_counts_above_the_limit_that_came_later_are_lowered() -> None:
    from mtp_dist.config.migration import saved_config

    values = json.loads(json.dumps(tiny_config().model_dump(mode="json")))
    values["checkpoint"]["every"] = 10**10
    values["run"]["seed"] = 2**60
    values["model"]["rope_theta"] = 1e10
    config = saved_config({"config": values, "vocab_size": 131})
    assert (config.checkpoint.every, config.run.seed, config.model.rope_theta) == (2**31 - 1, 2**60, 1e10)


def test_a_newer_version_is_named_and_not_called_damage(tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["config_version"] = 99

    wanted = r"version 99, .* up to version \d+: install a newer mtp-dist"
    with pytest.raises(ConfigError, match=wanted) as error:
        read_metadata(changed(FIRST / "fp32" / f"step_{STEP:08d}", tmp_path / "checkpoint", change))
    assert "damaged" not in str(error.value)
    with pytest.raises(ConfigError, match=wanted) as error:
        SavedHeads(changed(FIRST / "export", tmp_path / "export", change, "mtp_config.json"))
    assert "damaged" not in str(error.value)


def test_what_is_saved_says_its_version(tmp_path: Path) -> None:
    values = json.loads((write_checkpoint(tmp_path, 10) / "config.json").read_text())
    assert values.get("config_version", 1) > 1

    from mtp_dist.config.migration import VERSION

    assert values["config_version"] == VERSION


def test_the_index_says_which_weights_have_which_moments(ranks: Ranks, tmp_path: Path) -> None:
    """Those of a weight that has none, as a frozen one, start from 0."""
    folder = write_checkpoint(tmp_path / "whole", 10)
    frozen = "embedding.weight"

    def change(values: dict[str, Any]) -> None:
        for moment in ("exp_avg", "exp_avg_sq"):
            del values["weight_map"][f"{moment}.{frozen}"]

    folder = changed(folder, tmp_path / folder.name, change, "optimizer.safetensors.index.json")
    check_fully(folder)
    [part] = ranks.run(1, train_part, config_in(tmp_path), 10, 10, folder, False)
    for name, moment in part.moments.items():
        assert torch.equal(moment, torch.full_like(moment, 0.0 if name.endswith(f".{frozen}") else 10.5)), name
    assert all(torch.equal(weight, torch.full_like(weight, 10.5)) for weight in part.weights.values())
