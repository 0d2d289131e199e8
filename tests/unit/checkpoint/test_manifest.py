"""Whatever happens to a file of a checkpoint is seen before it is loaded."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from mtp_dist.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpointError,
    FileRecord,
    check_fully,
    check_quickly,
    read_manifest,
    record_of,
    tensor_files,
)
from mtp_dist.checkpoint.reader import load_weights
from tests.unit.checkpoint.folders import copied, damages, flip, write_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("manifest"), 10)


def test_lists_every_file_of_a_checkpoint(whole: Path) -> None:
    seen: list[tuple[int, int]] = []
    records = check_fully(whole, lambda done, total: seen.append((done, total)))
    assert records.keys() == {path.name for path in whole.iterdir()} - {MANIFEST}
    assert sorted(records) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
        "optimizer.safetensors.index.json",
    ]
    assert all(record_of(whole / name) == record for name, record in records.items())
    of_tensors = sum(records[name].bytes for name in tensor_files(records))
    assert seen[-1] == (of_tensors, of_tensors) and len(tensor_files(records)) == 4


def test_every_damage_of_every_file_is_found(whole: Path, tmp_path: Path) -> None:
    for name in (path.name for path in whole.iterdir()):
        for damage in damages(whole / name):
            folder = copied(whole, tmp_path / "damaged")
            damages(folder / name)[damage]()
            with pytest.raises(DamagedCheckpointError) as error:
                check_fully(folder)
            sentence = str(error.value)
            assert sentence.startswith(f"{folder} is not a checkpoint of ours, or a damaged one: "), (name, damage)
            # A manifest that is still one speaks of another file, or of a file's other name.
            assert name in sentence or name == MANIFEST, (name, damage, sentence)
            if "byte" in damage and name.startswith("optimizer-"):
                load_weights(folder)  # which does not read the moments
            else:
                with pytest.raises(DamagedCheckpointError):
                    load_weights(folder)
            if "byte" not in damage or (name.endswith(".json") and name != MANIFEST):
                with pytest.raises(DamagedCheckpointError):
                    check_quickly(folder)


def test_no_byte_of_the_manifest_may_change(whole: Path, tmp_path: Path) -> None:
    expected = read_manifest(whole)
    folder = copied(whole, tmp_path / "damaged")
    for position in range((whole / MANIFEST).stat().st_size):
        flip(folder / MANIFEST, position)
        with contextlib.suppress(DamagedCheckpointError):
            assert read_manifest(folder) != expected, position
        flip(folder / MANIFEST, position)
    assert check_fully(folder) == expected


def test_manifest_and_folder_name_the_same_files(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path / "changed")
    for name in ("notes.txt", "tokenizer.json", "run.yaml", ".hidden"):
        (folder / name).touch()
    assert check_fully(folder) == read_manifest(whole), "what is no part of a checkpoint may lie beside it"
    values = json.loads((folder / MANIFEST).read_text())
    further = values | {"files": values["files"] | {"model-00003-of-00003.safetensors": {"bytes": 0, "sha256": ""}}}
    (folder / MANIFEST).write_text(json.dumps(further))
    with pytest.raises(DamagedCheckpointError, match=r"model-00003-of-00003\.safetensors is missing"):
        check_quickly(folder)
    del values["files"]["config.json"]
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpointError, match=r"config\.json is not in manifest\.json"):
        check_quickly(folder)
    (folder / MANIFEST).write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(DamagedCheckpointError, match="it has not the keys of format 1"):
        check_quickly(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "optimizer.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
    ],
)
def test_a_checkpoint_without_one_of_its_parts_is_none(whole: Path, tmp_path: Path, name: str) -> None:
    """Even if its manifest does not miss it."""
    folder = copied(whole, tmp_path / "without")
    (folder / name).unlink()
    values = json.loads((folder / MANIFEST).read_text())
    del values["files"][name]
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpointError, match=f"{name}.* is not in {MANIFEST}"):
        check_quickly(folder)


@pytest.mark.parametrize("name", ["../notes.txt", "/etc/hostname", "sub/notes.txt", "..", ""])
def test_a_manifest_names_nothing_outside_of_its_folder(whole: Path, tmp_path: Path, name: str) -> None:
    folder = copied(whole, tmp_path / "changed")
    (folder / "sub").mkdir()
    for place in (tmp_path, folder / "sub"):
        (place / "notes.txt").write_text("notes")
    values = json.loads((folder / MANIFEST).read_text())
    path = Path(os.path.normpath(folder / name))
    record = record_of(path) if path.is_file() else FileRecord(path.stat().st_size, "")
    values["files"][name] = {"bytes": record.bytes, "sha256": record.sha256}
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DamagedCheckpointError, match="is no manifest"):
        check_quickly(folder)
