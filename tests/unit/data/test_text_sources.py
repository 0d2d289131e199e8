"""Every kind of input gives its documents in their order, wherever it is cut into work units."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.data.sources.text_sources import InputOptions, open_inputs
from mtp_dist.data.sources.work_units import WorkUnit, bytes_of_text, document_of_line
from mtp_dist.errors import UserError

TEXTS = [f"document {i} " + "é\n" * (i * 37 % 90) for i in range(40)] + ["", "end"]


def units(name: Path | str, unit_bytes: int = 300, **options: object) -> list[WorkUnit]:
    inputs = open_inputs([str(name)], InputOptions(**options))  # type: ignore[arg-type]
    return [unit for source in inputs for unit in source.units(unit_bytes)]


def documents(read: list[WorkUnit]) -> list[str]:
    return [document.decode() for unit in read for document in unit.documents()]


def json_lines(file: Path) -> Path:
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return file


def compressed_json_lines(file: Path) -> Path:
    file.write_bytes(gzip.compress(json_lines(file).read_bytes()))
    return file


def parquet(file: Path) -> Path:
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, file, row_group_size=7)
    return file


def saved_dataset(folder: Path) -> Path:
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS})}).save_to_disk(
        folder
    )
    return folder


RECORDS: dict[str, Callable[[Path], Path]] = {
    "a.jsonl": json_lines,
    "a.jsonl.gz": compressed_json_lines,
    "a.parquet": parquet,
    "dataset": saved_dataset,
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_all_read_in_their_order(tmp_path: Path, name: str) -> None:
    path = RECORDS[name](tmp_path / name)
    read = units(path)
    assert documents(read) == TEXTS
    assert len(read) > 3
    assert read[0].place(3) in (f"{path}, line 4", f"{path}, row 3")
    assert read[-1].place(len(list(read[-1].documents())) - 1) in (f"{path}, line 42", f"{path}, row 41")


@pytest.mark.parametrize("name", RECORDS)
def test_the_sizes_of_the_units_add_up(tmp_path: Path, name: str) -> None:
    source = open_inputs([str(RECORDS[name](tmp_path / name))], InputOptions())[0]
    assert source.total is not None
    # The end of a gzip file is read with its last lines, a share of a Parquet file is rounded.
    assert sum(unit.size for unit in source.units(300)) == pytest.approx(source.total, abs=10)


def test_a_dataset_can_be_streamed(tmp_path: Path) -> None:
    path = saved_dataset(tmp_path / "dataset")
    assert documents(units(path, streaming=True)) == TEXTS
    assert open_inputs([str(path)], InputOptions(streaming=True))[0].total is None


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 200), st.booleans())
def test_lines_are_read_once_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], unit_bytes: int, ends_with_newline: bool
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    texts = [str(i) * size for i, size in enumerate(sizes)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n" * ends_with_newline)
    read = units(file, unit_bytes)
    assert documents(read) == texts
    places = [unit.place(index) for unit in read for index, _ in enumerate(unit.documents())]
    assert places == [f"{file}, line {number}" for number in range(1, len(texts) + 1)]


def test_a_folder_gives_the_files_of_a_pattern_by_their_kinds(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    json_lines(tmp_path / "b.jsonl")
    assert documents(units(tmp_path, glob="**/*.py")) == ["a/z.py", "b.py"]
    everything = units(tmp_path, unit_bytes=10**6, glob="**/*")
    assert documents(everything) == ["a.txt", "a/z.py", *TEXTS, "b.py", "c.md"]
    assert [type(unit).__name__ for unit in everything] == ["WholeFiles", "LineRange", "WholeFiles"]
    assert everything[2].place(1) == str(tmp_path / "c.md")


def test_files_of_a_folder_can_be_split(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}.py").write_text(str(number))
    train, validation = (documents(units(tmp_path, glob="*.py", split=split)) for split in ("train", "validation"))
    assert 0 < len(validation) < 20
    assert sorted(train + validation) == sorted(map(str, range(100)))


def message(name: Path | str, **options: object) -> str:
    with pytest.raises(UserError) as error:
        for unit in units(name, **options):  # type: ignore[arg-type]
            list(unit.documents())
    return str(error.value)


def test_inputs_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    assert "say which of its files with --glob" in message(tmp_path)
    assert "has no file for --glob '*.py'" in message(tmp_path, glob="*.py")
    assert "is not a valid pattern" in message(tmp_path, glob="/*.py")
    assert "--split = 'test' is not known" in message(tmp_path, glob="*", split="test")
    (tmp_path / "a.tar.gz").touch()
    assert "a.tar.gz is an archive: unpack it" in message(tmp_path / "a.tar.gz")
    (tmp_path / "a.txt").touch()
    assert "--glob '*' chooses files of a folder" in message(tmp_path / "a.txt", glob="*")
    assert "--split = 'train' chooses a part" in message(tmp_path / "a.txt", split="train")
    assert "does not exist: give a folder, a file" in message(tmp_path / "missing.txt")
    (tmp_path / "a.parquet").write_text("no")
    assert "a.parquet is no whole Parquet file" in message(tmp_path / "a.parquet")
    whole = compressed_json_lines(tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "a.jsonl.gz is not a complete gzip file" in message(tmp_path / "a.jsonl.gz")


def test_a_run_is_told_the_keys_of_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    of_run = {"key": "data.train.3"}
    assert message(tmp_path, **of_run).startswith(f"data.train.3.path = '{tmp_path}' is a folder: say which")
    assert "data.train.3.split = 'train' chooses a part" in message(tmp_path / "a.txt", split="train", **of_run)
    assert "choose with data.train.3.split" in message(saved_dataset(tmp_path / "d"), split="test", **of_run)


@pytest.mark.parametrize("name", RECORDS)
def test_a_field_that_is_missing_or_no_text_is_named_beside_those_there_are(tmp_path: Path, name: str) -> None:
    path = RECORDS[name](tmp_path / name)
    missing = message(path, field="content")
    assert f"{path}" in missing and "has no field 'content', it has " in missing and "'text'" in missing
    assert "'id' is not text but " in message(path, field="id")


@pytest.fixture
def hub_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub answers that it has every dataset."""
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)


@pytest.mark.usefixtures("hub_has_it")
def test_subset_and_split_reach_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load(*names: object, **options: object) -> datasets.Dataset:
        asked.append((*names, options))
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert documents(units("some/web", subset="en", split="test")) == TEXTS
    assert asked == [("some/web", "en", {"split": "test", "streaming": False})]


def test_a_dataset_names_the_splits_it_has(tmp_path: Path) -> None:
    assert "has no split 'test', it has train" in message(saved_dataset(tmp_path / "d"), split="test")


@pytest.mark.usefixtures("hub_has_it")
def test_a_dataset_that_cannot_be_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'no/such' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert message("no/such").endswith("cannot load it: Couldn't reach 'no/such' on the Hub")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"a": 1}', "has no field 'text', it has 'a'"),
        ('{"text": 3}', "the field 'text' is not text but int"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' * 50 + line + "\n")
    said = message(file)
    assert f"{file}, line 51" in said and reason in said


def test_json_nested_too_deep_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert f"{file}, line 2" in (said := message(file)) and "nested" in said and len(said) < 1000


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "other", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert f"{tmp_path / 'a.parquet'} has 2 fields 'text'" in message(tmp_path / "a.parquet")
    assert documents(units(tmp_path / "a.parquet", field="other")) == ["b"]


@pytest.mark.parametrize("name", ["corpara/web", "corpara/web.jsonl"])
def test_a_wrong_path_with_one_slash_is_refused_without_waiting_for_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The datasets library asks again for 25 seconds what the hub cannot answer."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the datasets library was asked"))
    said = message(name)
    assert f"INPUT '{name}' does not exist" in said
    assert ("Name or service not known" in said) == (name == "corpara/web"), "what cannot be a dataset is not asked for"


def test_blank_lines_and_nulls_are_empty_documents_and_bad_bytes_stay_as_they_are() -> None:
    def place() -> str:
        raise AssertionError("no mistake")

    read = [document_of_line(line, "text", place) for line in (b"", b" \r\n", b'{"text": null}', b'{"text": "a\xffb"}')]
    assert read == [b"", b"", b"", b"a\xffb"]
    half = document_of_line(rb'{"text": "\ud83d!"}', "text", place)
    with pytest.raises(UnicodeDecodeError):
        half.decode()
    assert bytes_of_text(b"\xff", "text", place) == b"\xff"
