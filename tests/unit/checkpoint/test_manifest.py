"""Corruption of any file of a checkpoint is found before it is loaded."""

import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint.format import MANIFEST, InvalidCheckpointError
from mtp_dist.checkpoint.manifest import check_fully, check_quickly, read_manifest, record_of, tensor_files
from mtp_dist.checkpoint.reader import load_weights
from tests.unit.checkpoint.folders import DAMAGES, copied, edit_json, write_checkpoint

FILES = [f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (1, 2)]
FILES += ["config.json", "model.safetensors.index.json", "optimizer.safetensors.index.json"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("manifest"), 10)


def test_manifest_lists_every_file(valid: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    records = check_fully(valid, lambda *done: progress.append(done))
    assert records.keys() == {path.name for path in valid.iterdir()} - {MANIFEST} == set(FILES)
    assert all(record_of(valid / name) == record for name, record in records.items())
    tensor_bytes = sum(records[name].bytes for name in tensor_files(records))
    assert progress[-1] == (tensor_bytes, tensor_bytes) and len(tensor_files(records)) == 4
    folder = copied(valid, tmp_path / "changed")
    for name in ("notes.txt", "tokenizer.json", "run.yaml", ".hidden"):
        (folder / name).touch()
    assert check_fully(folder) == read_manifest(valid), "other files are ignored"


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_damage_of_every_file_is_found(valid: Path, tmp_path: Path, name: str) -> None:
    for damage, do_damage in DAMAGES.items():
        folder = copied(valid, tmp_path / "damaged")
        do_damage(folder / name)
        with pytest.raises(InvalidCheckpointError) as error:
            check_fully(folder)
        message = str(pickle.loads(pickle.dumps(error.value)))  # as rank 0 sends it to the others
        assert message.startswith(f"{folder} is not a valid mtp_dist checkpoint (corrupt or incomplete): "), damage
        # A manifest that is still valid names another file, or another name of a file.
        assert name in message or name == MANIFEST, (damage, message)
        is_in_moments = "byte" in damage and name.startswith("optimizer-")
        with nullcontext() if is_in_moments else pytest.raises(InvalidCheckpointError):
            load_weights(folder)  # which does not read the moments
        if "byte" not in damage or (name.endswith(".json") and name != MANIFEST):
            with pytest.raises(InvalidCheckpointError):
                check_quickly(folder)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a file too many": (lambda values: values["files"].update({"another": {"bytes": 0, "sha256": ""}}), "is missing"),
    "another format": (lambda values: values.update(format=2), "it does not have the keys of format 1"),
    **{name: (lambda values, name=name: values["files"].pop(name), f"{name}.* is not in {MANIFEST}") for name in FILES},
}


@pytest.mark.parametrize("case", CHANGES)
def test_incomplete_checkpoints_are_refused(valid: Path, tmp_path: Path, case: str) -> None:
    """Also if the manifest agrees that a file is missing."""
    change, message = CHANGES[case]
    folder = copied(valid, tmp_path / "without")
    (folder / case).unlink(missing_ok=True)
    edit_json(folder / MANIFEST, change)
    with pytest.raises(InvalidCheckpointError, match=message):
        check_quickly(folder)


@pytest.mark.parametrize("name", ["../notes.txt", "/etc/hostname", "sub/notes.txt", "..", ""])
def test_manifest_names_no_file_outside_its_folder(valid: Path, tmp_path: Path, name: str) -> None:
    folder = copied(valid, tmp_path / "changed")
    (folder / "sub").mkdir()
    for parent in (tmp_path, folder / "sub"):
        (parent / "notes.txt").write_text("notes")
    path = Path(os.path.normpath(folder / name))
    record = {"bytes": path.stat().st_size, "sha256": record_of(path).sha256 if path.is_file() else ""}
    edit_json(folder / MANIFEST, lambda values: values["files"].update({name: record}))
    with pytest.raises(InvalidCheckpointError, match="is not a valid manifest"):
        check_quickly(folder)
