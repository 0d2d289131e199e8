"""What is saved at any layout opens whole."""

import errno
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mtp_dist.checkpoint.format import SavedLayout, read_metadata
from mtp_dist.checkpoint.manifest import check_fully, read_manifest, record_of, write_manifest
from mtp_dist.checkpoint.reader import TensorReader, load_weights
from mtp_dist.checkpoint.save import write_tensor_files
from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import ConfigError
from mtp_dist.model.parameters import initial_weight, parameter_shapes
from mtp_dist.model.reference import ReferenceModel
from tests.ranks import Ranks
from tests.tiny import VOCAB_SIZE, tiny_config
from tests.unit.checkpoint.folders import as_saved, config_in, flip, write_checkpoint, write_unfinished
from tests.unit.checkpoint.on_ranks import LOSSES, RECENT, train_part

STEP = 1
CASES: dict[str, tuple[tuple[int, int, int], dict[str, dict[str, Any]]]] = {
    "2 x 2 x 1": ((2, 2, 1), {}),
    "2 x 2 x 1 tied": ((2, 2, 1), {"model": {"tie_embeddings": True}, "parallel": {"partition": [3, 1]}}),
    "1 x 1 x 2 bf16": ((1, 1, 2), {"train": {"precision": "bf16"}, "heads": {"loss_weights": [1, 0.5, 0.5, 2]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_saved_is_loaded(ranks: Ranks, tmp_path: Path, case: str) -> None:
    (tensor, pipeline, data), sections = CASES[case]
    sections = {name: dict(section) for name, section in sections.items()}
    sections["parallel"] = {"tensor": tensor, "pipeline": pipeline} | sections.get("parallel", {})
    config = tiny_config(checkpoint={"directory": str(tmp_path / "deep" / "down")}, **sections)
    parts = ranks.run(tensor * pipeline * data, train_part, config, 0, STEP)
    saved = {name: weight for part in parts for name, weight in part.weights.items()}
    moments = {name: moment for part in parts for name, moment in part.moments.items()}

    folder = tmp_path / "deep" / "down" / f"step_{STEP:08d}"
    left = sorted(path.name for path in folder.parent.iterdir())
    assert left == ["latest", folder.name], "nothing unfinished is left"
    assert (folder.parent / "latest").read_text() == f"{folder.name}\n"
    loaded_config, weights = load_weights(folder)
    assert loaded_config == as_saved(config) and loaded_config.vocab_size == VOCAB_SIZE
    description = read_metadata(folder)
    assert (description.step, description.optimizer_updates) == (STEP, STEP)
    zero_stage = int(config.train.precision == "bf16")
    assert description.layout == SavedLayout(tensor, pipeline, data, tensor * pipeline * data, zero_stage)
    assert (description.losses, description.recent_losses) == (LOSSES, RECENT)
    assert description.versions["torch"] == torch.__version__ and description.versions["deepspeed"]
    shapes = parameter_shapes(config)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes, "no padded vocabulary"
    assert ("unembedding.weight" in weights) != config.model.tie_embeddings
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, saved[name]), name
        assert not torch.equal(weight, initial_weight(config, name, shapes[name])), "and it was trained"
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values()), "not rounded"
    reader = TensorReader(folder, "optimizer")
    assert (
        reader.weight_map.keys()
        == moments.keys()
        == {f"{key}.{n}" for key in ("exp_avg", "exp_avg_sq") for n in shapes}
    )
    assert all(torch.equal(reader.read(name), moment) and moment.any() for name, moment in moments.items())

    model = ReferenceModel(loaded_config, weights)
    logits = model(torch.arange(8)[None])
    assert len(logits) == 4 and all(of_head.isfinite().all() for of_head in logits.values())
    for kind, number in {"model": 4, "optimizer": 8}.items():
        check_index(folder, kind, number * sum(math.prod(shape) for shape in shapes.values()))
    assert len(list(folder.glob("model-*.safetensors"))) == tensor * pipeline * data, "every rank writes its share"


def check_index(folder: Path, kind: str, total_size: int) -> None:
    """As Hugging Face's tools read it."""
    index = json.loads((folder / f"{kind}.safetensors.index.json").read_text())
    for path in folder.glob(f"{kind}-*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {name for name, home in index["weight_map"].items() if home == path.name} == set(file.keys())
    assert index["metadata"]["total_size"] == total_size


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_weights(tmp_path / "missing")
    assert str(error.value).startswith(f"{tmp_path / 'missing'} is not a checkpoint of ours")
    assert "manifest.json cannot be read (No such file or directory)" in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        load_weights(tmp_path)
    assert str(error.value).startswith(f"{tmp_path} is not a checkpoint of ours")


@pytest.mark.parametrize("broken", ["a file", "other model", "no index of weights", "not json", "missing part"])
def test_what_is_almost_a_checkpoint(tmp_path: Path, broken: str) -> None:
    config = tiny_config().model_dump(mode="json")
    description = {"step": 1, "vocab_size": VOCAB_SIZE, "optimizer_updates": 1, "config": config}
    index: dict[str, Any] = {"weight_map": {"embedding.weight": "model-00001-of-00001.safetensors"}}
    if broken == "other model":
        description = {"architectures": ["LlamaForCausalLM"]}
    if broken == "no index of weights":
        index = {}
    (tmp_path / "config.json").write_text("{" if broken == "not json" else json.dumps(description))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(tmp_path, {path.name: record_of(path) for path in tmp_path.iterdir()})
    with pytest.raises(ConfigError) as error:
        load_weights(tmp_path / "config.json" if broken == "a file" else tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_reads_back_wrong_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology(1, 1, 1, 0, 0, 0, torch.device("cpu"))
    tensors = {"model": {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(3)}}
    [(name, written)] = write_tensor_files(tmp_path, tensors, topology).items()
    assert name == "model-00001-of-00001.safetensors" and written.record == record_of(tmp_path / name)

    def write_one_bit_wrong(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        flip(path, -1)

    monkeypatch.setattr("mtp_dist.checkpoint.save.save_file", write_one_bit_wrong)
    with pytest.raises(OSError, match="b reads back as something else than was written") as error:
        write_tensor_files(tmp_path, tensors, topology)
    assert error.value.filename == tmp_path / name


def test_python_without_asserts_saves_a_checkpoint_with_all_its_parts(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.checkpoint.manifest import check_fully
from tests.unit.checkpoint.folders import write_checkpoint
if __debug__:
    raise SystemExit("asserts are on")
folder = write_checkpoint(Path({str(tmp_path)!r}), 10)
check_fully(folder)
config, weights = load_weights(folder)
print(len(weights), sorted(path.name for path in folder.glob("*.json")))
"""
    run = subprocess.run(
        [sys.executable, "-O", "-c", program],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    names = ["config.json", "manifest.json", "model.safetensors.index.json", "optimizer.safetensors.index.json"]
    assert run.stdout.splitlines()[-1] == f"{len(parameter_shapes(tiny_config()))} {names}"


def test_a_checkpoint_is_whole_although_the_list_of_its_files_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS or in an object store, where a new file is in no list for some seconds."""
    with monkeypatch.context() as stale:
        stale.setattr(Path, "glob", lambda *_: iter(()))
        stale.setattr(Path, "iterdir", lambda _: iter(()))
        folder = write_unfinished(config_in(tmp_path), 10)
        check_fully(folder)
    check_fully(folder)
    shapes = parameter_shapes(tiny_config())
    assert TensorReader(folder, "model").shapes() == shapes
    check_index(folder, "model", 4 * sum(map(math.prod, shapes.values())))
    check_index(folder, "optimizer", 8 * sum(map(math.prod, shapes.values())))
    assert read_manifest(folder).keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize(
    ("number", "tolerated"),
    [
        *(pytest.param(number, True) for number in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)),
        (errno.EIO, False),
    ],
)
def test_mounts_that_do_not_sync_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, tolerated: bool
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if tolerated:
        check_fully(write_checkpoint(tmp_path, 10))
    else:
        with pytest.raises(OSError, match="Input/output error"):
            write_checkpoint(tmp_path, 10)


def test_a_file_that_cannot_be_synced_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Invalid argument"):
        write_checkpoint(tmp_path, 10)


ELSEWHERE: dict[str, str] = {
    "above": "../outside.safetensors",
    "absolute": "{folder}/outside.safetensors",
    "below": "sub/outside.safetensors",
    "not in the manifest": "outside.safetensors",
}


@pytest.mark.parametrize("kind", ["model", "optimizer"])
@pytest.mark.parametrize("case", ELSEWHERE)
def test_only_files_of_the_manifest_are_read(tmp_path: Path, kind: str, case: str) -> None:
    folder = write_checkpoint(tmp_path, 10)
    (folder / "sub").mkdir()
    for outside in (tmp_path, folder, folder / "sub"):
        save_file(
            {"exp_avg.embedding.weight": torch.ones(3), "embedding.weight": torch.ones(3)},
            outside / "outside.safetensors",
        )
    index = folder / f"{kind}.safetensors.index.json"
    values = json.loads(index.read_text())
    name = "exp_avg.embedding.weight" if kind == "optimizer" else "embedding.weight"
    values["weight_map"][name] = ELSEWHERE[case].format(folder=tmp_path)
    index.write_text(json.dumps(values))
    manifest = json.loads((folder / "manifest.json").read_text())
    record = record_of(index)
    manifest["files"][index.name] = {"bytes": record.bytes, "sha256": record.sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for read in (check_fully, load_weights, lambda folder: TensorReader(folder, kind).read(name)):
        with pytest.raises(ConfigError, match=r"outside\.safetensors"):
            read(folder)


def test_tensors_are_read_without_the_engine() -> None:
    program = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("deepspeed", "megatron"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import mtp_dist.checkpoint.reader
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
