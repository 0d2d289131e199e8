"""A checkpoint saved at any layout contains full tensors that can be opened anywhere."""

import errno
import json
import math
import os
import stat
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtp_dist.checkpoint.format import SavedLayout, read_metadata
from mtp_dist.checkpoint.manifest import check_fully, read_manifest, record_of, write_manifest
from mtp_dist.checkpoint.reader import TensorReader, load_weights
from mtp_dist.checkpoint.save import write_tensor_files
from mtp_dist.config import build_config
from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import CheckpointError
from mtp_dist.model.parameters import initial_weight, parameter_shapes
from tests.integration import jobs
from tests.parity.resuming import BOTH, DATA, Layout, at, run
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.checkpoint.folders import config_in, edit_json, flip, write_checkpoint, write_unfinished
from tests.unit.checkpoint.on_ranks import LOSSES, RECENT

STEP = 1
CASES: dict[str, tuple[Layout, dict[str, dict[str, Any]]]] = {
    "2 x 2 x 1": (BOTH, {}),
    "2 x 2 x 1 tied": (BOTH, {"model": {"tie_embeddings": True}, "parallel": {"partition": [3, 1]}}),
    "1 x 1 x 2 bf16": (DATA, {"train": {"precision": "bf16"}, "heads": {"loss_weights": [1, 0.5, 0.5, 2]}}),
}


@pytest.mark.parametrize("case", CASES)
def test_saved_state_is_loaded(ranks: Ranks, tmp_path: Path, case: str) -> None:
    layout, sections = CASES[case]
    directory = tmp_path / "deep" / "down"
    config = at(layout, directory, **sections)
    trained = run(ranks, config, layout, 0, STEP)

    folder = directory / f"step_{STEP:08d}"
    assert sorted(path.name for path in directory.iterdir()) == ["latest", folder.name], "no staging directory remains"
    assert (directory / "latest").read_text() == f"{folder.name}\n"
    loaded_config, weights = load_weights(folder)
    assert loaded_config == build_config(config.model_dump(mode="json"))
    metadata = read_metadata(folder)
    assert (metadata.step, metadata.optimizer_updates) == (STEP, STEP)
    zero_stage = int(config.train.precision == "bf16")
    assert metadata.layout == SavedLayout(*layout[:3], layout.world_size, zero_stage)
    assert (metadata.losses, metadata.recent_losses) == (LOSSES, RECENT)
    assert metadata.versions["torch"] == torch.__version__ and metadata.versions["deepspeed"]
    shapes = parameter_shapes(config)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes, "no padded vocabulary"
    assert ("unembedding.weight" in weights) != config.model.tie_embeddings
    for name, weight in weights.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, trained.weights[name]), name
        assert not torch.equal(weight, initial_weight(config, name, shapes[name])), "and it was trained"
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values()), "not rounded"
    reader = TensorReader(folder, "optimizer")
    expected = {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in shapes}
    assert reader.weight_map.keys() == trained.moments.keys() == expected
    assert all(torch.equal(reader.read(name), moment) and moment.any() for name, moment in trained.moments.items())
    check_indexes(folder, shapes)
    assert len(list(folder.glob("model-*.safetensors"))) == layout.world_size, "every rank writes a file"


def check_indexes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the indexes with the files, as Hugging Face's tools read both."""
    for kind, number_bytes in {"model": 4, "optimizer": 8}.items():
        index = json.loads((folder / f"{kind}.safetensors.index.json").read_text())
        for path in folder.glob(f"{kind}-*.safetensors"):
            assert {name for name, its in index["weight_map"].items() if its == path.name} == load_file(path).keys()
        assert index["metadata"]["total_size"] == number_bytes * sum(map(math.prod, shapes.values()))


def test_other_folders_are_not_valid_checkpoints(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors.index.json").write_text("{}")
    for content in (None, "{", "[]", '{"architectures": ["LlamaForCausalLM"]}'):
        if content:
            (other / "config.json").write_text(content)
            names = ("config.json", "model.safetensors.index.json")
            write_manifest(other, {name: record_of(other / name) for name in names})
        for folder in (tmp_path / "missing", other, other / "config.json"):
            for read in (load_weights, read_metadata):
                with pytest.raises(CheckpointError, match=f"^{folder} is not a valid mtp_dist checkpoint"):
                    read(folder)


def test_file_that_reads_back_wrong_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology(1, 1, 1, 0, 0, 0, torch.device("cpu"))
    tensors = {"model": {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(3)}}
    [(name, written)] = write_tensor_files(tmp_path, tensors, topology).items()
    assert name == "model-00001-of-00001.safetensors" and written.record == record_of(tmp_path / name)

    def write_one_bit_wrong(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file(tensors, path)
        flip(path, -1)

    monkeypatch.setattr("mtp_dist.checkpoint.save.save_file", write_one_bit_wrong)
    with pytest.raises(OSError, match="b does not read back as it was written") as error:
        write_tensor_files(tmp_path, tensors, topology)
    assert error.value.filename == tmp_path / name


def run_python(program: str, folder: Path, *options: str) -> str:
    return jobs.run([sys.executable, *options, "-c", program, str(folder)], status=0).stdout.splitlines()[-1]


def test_python_without_asserts_saves_a_complete_checkpoint(tmp_path: Path) -> None:
    program = """
assert False, "asserts are on"
import pathlib, sys, torch
from mtp_dist.checkpoint.reader import load_weights
from tests.unit.checkpoint.folders import write_checkpoint
folder = write_checkpoint(pathlib.Path(sys.argv[1]), 10)
print(len(load_weights(folder)[1]), sorted(path.name for path in folder.glob("*.json")))
"""
    names = ["config.json", "manifest.json", "model.safetensors.index.json", "optimizer.safetensors.index.json"]
    assert run_python(program, tmp_path, "-O") == f"{len(parameter_shapes(tiny_config()))} {names}"


def test_conversion_and_reference_need_neither_deepspeed_nor_megatron(tmp_path: Path) -> None:
    """Export, import, load_weights and the reference, in a process that cannot import either."""
    program = """
import pathlib, sys, torch
sys.modules.update(deepspeed=None, megatron=None)
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.convert.to_huggingface import export_checkpoint
from mtp_dist.model.reference import ReferenceModel
from tests.unit.convert.folders import import_from, write_model
folder = pathlib.Path(sys.argv[1])
write_model(folder / "c")
export_checkpoint(folder / "c", folder / "hf", None)
model = ReferenceModel(*load_weights(import_from(folder, to="back")))
print(model.next_token_logits(torch.tensor([[1, 2, 3]])).shape[1])
"""
    assert run_python(program, tmp_path) == "3"


def test_stale_file_listing_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS or in an object store a new file is not listed for some seconds."""
    with monkeypatch.context() as stale:
        stale.setattr(Path, "glob", lambda *_: iter(()))
        stale.setattr(Path, "iterdir", lambda _: iter(()))
        folder = write_unfinished(config_in(tmp_path), 10)
        check_fully(folder)
    check_fully(folder)
    shapes = parameter_shapes(tiny_config())
    assert TensorReader(folder, "model").shapes() == shapes
    check_indexes(folder, shapes)
    assert read_manifest(folder).keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EIO])
@pytest.mark.parametrize("kind", [stat.S_ISDIR, stat.S_ISREG])
def test_only_folders_may_refuse_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: Any) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    fails = kind is stat.S_ISREG or number == errno.EIO
    with pytest.raises(OSError, match=os.strerror(number)) if fails else nullcontext():
        check_fully(write_checkpoint(tmp_path, 10))


def test_every_file_is_synced_before_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synced = os.fsync, set()

    def record(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    folder = write_unfinished(config_in(tmp_path), 10)
    assert synced >= {folder, *folder.iterdir()}


@pytest.mark.parametrize("kind", ["model", "optimizer"])
@pytest.mark.parametrize("path", ["../outside.safetensors", "{}/outside.safetensors", "sub/outside.safetensors", ""])
def test_only_files_of_the_manifest_are_read(tmp_path: Path, kind: str, path: str) -> None:
    folder = write_checkpoint(tmp_path, 10)
    (folder / "sub").mkdir()
    name = "exp_avg.embedding.weight" if kind == "optimizer" else "embedding.weight"
    for parent in (tmp_path, folder, folder / "sub"):
        save_file({name: torch.ones(3)}, parent / "outside.safetensors")
    outside = path.format(tmp_path) or "outside.safetensors"
    edit_json(folder / f"{kind}.safetensors.index.json", lambda values: values["weight_map"].update({name: outside}))
    for read in (check_fully, load_weights, lambda folder: TensorReader(folder, kind).read(name)):
        with pytest.raises(CheckpointError, match=r"outside\.safetensors"):
            read(folder)
