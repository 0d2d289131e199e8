"""`mtp-dist inspect` of checkpoints, for people and for programs."""

import json
import math
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mtp_dist.cli import app
from mtp_dist.model.parameters import parameter_shapes
from tests.tiny import VOCAB_SIZE
from tests.unit.checkpoint.folders import config_in, flip, write_checkpoint


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    return tmp_path


def test_one_checkpoint(directory: Path) -> None:
    folder = directory / "step_00000020"
    shown = inspect(folder, "--json")
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert (report["step"], report["optimizer_updates"], report["vocab_size"]) == (20, 20, VOCAB_SIZE)
    assert report["layout"] == {"tensor": 2, "pipeline": 1, "data": 1, "world_size": 2, "zero_stage": 0}
    assert report["losses"] == [3.5, None] and report["versions"].keys() >= {"torch", "deepspeed", "megatron-core"}
    shapes = parameter_shapes(config_in(directory))
    parts = report["parameters"]
    assert parts.keys() == {"embeddings", "trunk", "head 1", "head 2", "head 3", "head 4", "final_norm"}
    assert sum(parts.values()) == sum(map(math.prod, shapes.values()))
    assert (parts["embeddings"], parts["final_norm"]) == (2 * VOCAB_SIZE * 32, 32)
    assert parts["head 1"] == parts["head 4"] == parts["trunk"] / 4
    groups = {group.pop("name"): group for group in report["weights"]}
    assert groups["trunk.*.mlp.linear_fc2.weight"] == {"count": 4, "shape": [32, 48]}
    assert sum(group["count"] for group in groups.values()) == len(shapes) and len(groups) == 3 + 6 + 6
    for kind, pattern in {"weights": "model-*", "optimizer": "optimizer-*"}.items():
        assert report["bytes"][kind] == sum(path.stat().st_size for path in folder.glob(pattern))
    text = inspect(folder).stdout
    for fact in ("20, 20 updates", "tensor 2 x pipeline 1 x data 1, ZeRO 0, 2 processes", "3.5000 -", "7 files are"):
        assert fact in text
    assert "heads.*.0.self_attention.linear_qkv.weight" in text
    flip(folder / "optimizer-00001-of-00002.safetensors", -1)
    for options in ([], ["--json"]):
        shown = inspect(folder, *options)
        assert shown.exit_code == 2 and shown.stdout == ""
        [message] = shown.stderr.splitlines()
        assert message.startswith(f"error: {folder} is ") and "optimizer-00001-of-00002.safetensors has" in message


def test_several_checkpoints(directory: Path, tmp_path: Path) -> None:
    lines = json.loads(inspect(directory, "--json").stdout)
    assert [(line["step"], line["latest"], line["damage"]) for line in lines] == [(20, True, None), (10, False, None)]
    assert all(line["bytes"] > 1e5 and line["losses"] == [3.5, None] for line in lines)
    assert "latest" in inspect(directory).stdout
    flip(directory / "step_00000010" / "config.json", 9)
    shown = inspect(directory)
    assert shown.exit_code == 2 and "DAMAGED" in shown.stdout and "intact" in shown.stdout
    assert shown.stderr.startswith(f"error: {directory / 'step_00000010'} is ") and "config.json" in shown.stderr
    write_checkpoint(tmp_path / "run" / "checkpoints", 30)
    assert [line["step"] for line in json.loads(inspect(tmp_path / "run", "--json").stdout)] == [30]
    (directory / "empty").mkdir()
    assert inspect(directory / "empty").exit_code == 2
