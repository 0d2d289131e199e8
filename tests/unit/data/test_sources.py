import hashlib
import sysconfig
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config import ConfigError, SourceConfig, build_config
from mtp_dist.data.sources import (
    PYTHON_STDLIB,
    STDLIB_SKIPPED_FOLDERS,
    check_sources,
    in_validation_split,
    read_documents,
    select_files,
)

SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")


def write_folder(root: Path, count: int = 200) -> Path:
    for number in range(count):
        file = root / f"part{number % 7}" / f"file{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"x = {number}\n")
    return root


def test_a_folder_gives_all_its_python_files_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a.py", "notes.txt", "a/deep/er.py", "test/t.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    documents = read_documents(SourceConfig(path=str(tmp_path)))
    assert documents == [b"a.py", b"a/deep/er.py", b"a/z.py", b"b.py", b"test/t.py"]


def test_the_splits_are_disjoint_complete_and_keep_the_order(tmp_path: Path) -> None:
    path = str(write_folder(tmp_path))
    everything = select_files(SourceConfig(path=path))
    train, validation = (select_files(SourceConfig(path=path, split=split)) for split in SPLITS)
    assert sorted(train + validation) == sorted(everything)
    assert [file for file in everything if file in set(validation)] == validation
    assert 0 < len(validation) < len(everything) / 5


def test_the_split_of_a_file_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    first, second = (write_folder(tmp_path / name) for name in ("one", "two/deeper"))
    chosen = [
        {file.relative_to(root) for file in select_files(SourceConfig(path=str(root), split="validation"))}
        for root in (first, second)
    ]
    assert chosen[0] == chosen[1]


@given(st.text(st.characters(codec="utf-8")))
def test_validation_is_the_lowest_twentieth_of_the_hashes(path: str) -> None:
    fraction = int(hashlib.sha256(path.encode()).hexdigest(), 16) / 2**256
    assert in_validation_split(path) == (fraction < 0.05)


def test_a_single_file_is_one_document_of_any_kind(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"\xff raw")
    assert read_documents(SourceConfig(path=str(file))) == [b"\xff raw"]


def test_empty_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("a")
    assert read_documents(SourceConfig(path=str(tmp_path))) == [b"a"]


def test_broken_links_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.py").write_text("a")
    assert read_documents(SourceConfig(path=str(tmp_path))) == [b"a"]


def test_the_standard_library_leaves_out_packages_and_tests() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file.relative_to(root) for file in select_files(SourceConfig(path=PYTHON_STDLIB))]
    assert {"os.py", "asyncio/base_events.py"} <= {file.as_posix() for file in files}
    assert not any(STDLIB_SKIPPED_FOLDERS.intersection(file.parts) for file in files)


def message(source: SourceConfig) -> str:
    with pytest.raises(ConfigError) as error:
        read_documents(source, "data.train.0")
    return str(error.value)


def test_mistakes_are_named_with_their_key_and_a_remedy(tmp_path: Path) -> None:
    missing = message(SourceConfig(path="no/such/folder"))
    assert missing.startswith("data.train.0.path = 'no/such/folder' does not exist: give ")
    assert "has no .py file: give " in message(SourceConfig(path=str(tmp_path)))

    file = tmp_path / "only.py"
    file.touch()
    assert "has only empty files: give " in message(SourceConfig(path=str(tmp_path)))
    split = message(SourceConfig(path=str(file), split="train"))
    assert split.startswith("data.train.0.split = 'train' cannot split ") and "use 'all'" in split
    none_left = message(SourceConfig(path=str(tmp_path), split="validation"))
    assert none_left.startswith("data.train.0.split = 'validation' leaves none of the 1 files ")


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("a")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "a.py (Permission denied): change its permissions" in message(SourceConfig(path=str(tmp_path)))


def test_check_sources_names_the_wrong_source_and_opens_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_text("a")
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("a file was read"))
    values: dict[str, Any] = {
        "model": {"hidden_size": 8, "trunk_layers": 1, "num_attention_heads": 1},
        "data": {"train": [{"path": str(tmp_path)}], "validation": [{"path": str(tmp_path)}]},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 4},
    }
    check_sources(build_config(values))
    values["data"]["validation"].append({"path": "nowhere"})
    with pytest.raises(ConfigError, match=r"data\.validation\.1\.path = 'nowhere' does not exist"):
        check_sources(build_config(values))
