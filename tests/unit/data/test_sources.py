"""Files, folders and datasets: recognized or refused, and read in order wherever they are cut into work units."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import sysconfig
from itertools import compress
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import pandas
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.cli.data_tables import describe
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.sources.documents import encode_text
from mtp_dist.data.sources.fields import Fields
from mtp_dist.data.sources.input import InputOptions
from mtp_dist.data.sources.open_inputs import open_inputs
from mtp_dist.data.sources.python_stdlib import SKIPPED_FOLDERS, in_validation_split, stdlib_files
from mtp_dist.data.sources.work_units import parse_line
from mtp_dist.errors import ConfigError, DataError
from tests.unit.data.preparing import data_config, error_of, made, request, texts_of, write_jsonl

TEXTS = [f"document {i} " + "é\n" * (i * 37 % 90) for i in range(40)] + ["", "end"]
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
JSON_ARRAY = json.dumps(RECORDS).encode()
BYTE_ORDER_MARK = "\ufeff".encode()
FRAME = pandas.DataFrame(RECORDS)
SAVED = datasets.DatasetDict({"train": datasets.Dataset.from_pandas(FRAME)})
CSV = FRAME.to_csv(index=False, lineterminator="\r\n").encode()
COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": pyarrow.Codec("zstd").compress}
COMPRESSED = [(f"a.jsonl.{suffix}", compress(JSON_LINES)) for suffix, compress in COMPRESSIONS.items()]
FILES_OF_RECORDS = {
    **dict.fromkeys(("lines.json", "a.jsonl", "a.JSONL", "part-00000", "lines.txt"), JSON_LINES),
    **dict.fromkeys(("compressed.jsonl", "a.jsonl.GZ", "part-00000.gz"), gzip.compress(JSON_LINES)),
    **dict(COMPRESSED),
    "marked.jsonl": BYTE_ORDER_MARK + JSON_LINES,
    "lines.json.bz2": bz2.compress(JSON_LINES),
    "array.json": JSON_ARRAY,
    "array.json.gz": gzip.compress(JSON_ARRAY),
    "marked.json": BYTE_ORDER_MARK + JSON_ARRAY,
    "indented.json": json.dumps(RECORDS, indent=2).encode(),
    **dict.fromkeys(("a.csv", "a.CSV"), CSV),
    "marked.csv": BYTE_ORDER_MARK + CSV,
    "a.csv.gz": gzip.compress(CSV),
    "a.tsv": FRAME.to_csv(index=False, sep="\t").encode(),
    **dict.fromkeys(("a.PARQUET", "part-0"), FRAME.to_parquet(row_group_size=7)),
}


def units(name, unit_bytes=300, **options):
    return [unit for source in open_inputs([str(name)], InputOptions(**options)) for unit in source.units(unit_bytes)]


def documents(read):
    return [document.decode() for unit in read for document in unit.documents()]


def message(name, kind=DataError, **options):
    return error_of(kind, lambda: documents(units(name, **options)))


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def check_units(path, read, total):
    """Check all documents, their locations and the sizes: ends of gzip files and row groups are rounded."""
    assert documents(read) == TEXTS and len(read) > 3, "one process need not hold all of it"
    assert sum(unit.size for unit in read) == pytest.approx(total, abs=10)
    locations = [unit.location(index) for unit in read for index, _ in enumerate(unit.documents())]
    numbers = [location.removeprefix(f"{path}, ") for location in locations]
    assert numbers in ([f"line {i}" for i in range(1, 43)], [f"row {i}" for i in range(42)])


@pytest.mark.parametrize("name", FILES_OF_RECORDS)
def test_files_of_records_are_read_record_by_record(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES_OF_RECORDS[name])
    for read in (units(path), units(tmp_path, glob="**/*")):
        check_units(path, read, path.stat().st_size)
    text = message(path, field="content")
    assert str(path) in text and "has no field 'content', it has " in text and "'text'" in text
    if not name.lower().endswith(("csv", "tsv", "csv.gz")):
        assert "'id' is not text but " in message(path, field="id")


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets_are_read_row_by_row(tmp_path, streaming):
    SAVED.save_to_disk(path := tmp_path / "dataset")
    source = open_inputs([str(path)], InputOptions(streaming=streaming))[0]
    assert source.total == (None if streaming else len(TEXTS))
    check_units(path, list(source.units(300)), len(TEXTS))
    assert "has no field 'content', it has 'id', 'text'" in message(path, field="content")
    assert "'id' is not text but int" in message(path, field="id")


NO_RECORDS = " is JSON, but neither one object per line nor an array of objects"
UNREADABLE = {
    "settings.json": (json.dumps({"name": "package", "text": "no record"}, indent=2).encode(), NO_RECORDS),
    "numbers.json": (b"[1, 2, 3]", NO_RECORDS),
    **dict.fromkeys(("other.json", "other.txt"), (b'{"content": "a"}\n' * 2, " has no field 'text', it has 'content'")),
    "mixed.json": (b'[{"text": "a"}, {"name": "b"}]', " has no field 'text', it has 'name' in row 1"),
    "deep.json": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", NO_RECORDS),
    "text.txt.GZ": (gzip.compress(b"text " * 99), " is compressed: decompress it"),
    "renamed.txt": (b"PK\x03\x04" + b"text" * 9, " is binary"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", " is binary"),
    "paper.pdf": (b"%PDF-1.7\nobj", " is binary"),
    "short.bin.txt": (b"\xe1\x01\x02\x03", " is binary"),
    "windows.txt": ("Grüße\n".encode("utf-16"), " is UTF-16"),
    "windows.csv": (CSV.decode().encode("utf-16"), " is UTF-16"),
}
GOOD_LINES = b'{"text": "good"}\n' * 50
CORRUPT = {
    "a.tar.gz": (b"", " is an archive: unpack it"),
    "a.parquet": (b"no", " is not a valid Parquet file"),
    "no_field.csv": (b"id,content\n1,a\n", " has no field 'text', it has 'id', 'content'"),
    "twice.csv": (b"text,text\na,b\n", " has 2 fields 'text'"),
    "ragged.csv": (b"id,text\n1,a\n2\n", ", line 3 has 1 fields, the header has 2"),
    "quote.csv": (b'id,text\n1,a\n2,"b\n', ", line 3 is not valid CSV (unexpected end of data)"),
    "json.jsonl": (GOOD_LINES + b"{\n", ", line 51 is not valid JSON"),
    "list.jsonl": (GOOD_LINES + b"[1]\n", ", line 51 is not a JSON object"),
    "field.jsonl": (GOOD_LINES + b'{"a": 1}\n', ", line 51 has no field 'text', it has 'a'"),
    "number.jsonl": (GOOD_LINES + b'{"text": 3}\n', ", line 51: the field 'text' is not text but int"),
    "deep.jsonl": (GOOD_LINES + b"[" * 100_000 + b"]" * 100_000, ", line 51 is not valid JSON (nested too deep)"),
    **{f"cut.{name}": (content[: len(content) // 2], " is truncated or not a valid ") for name, content in COMPRESSED},
}


@pytest.mark.parametrize("name", [*UNREADABLE, *CORRUPT])
def test_unreadable_files_are_reported(tmp_path, name):
    content, reason = (UNREADABLE | CORRUPT)[name]
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name}{reason}" in message(tmp_path / name)


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], names=["text", "other", "text"]), file)
    assert f"{file} has 2 fields 'text'" in message(file) and documents(units(file, field="other")) == ["b"]


def test_files_of_a_folder_are_counted(tmp_path, monkeypatch):
    folder, really_scan = tmp_path / "folder", os.scandir
    tree(folder, "closed/b.py")

    def scan(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    read = {name: (FILES_OF_RECORDS[name], "") for name in ("lines.json", "a.csv", "a.PARQUET")}
    for name, (content, _) in (UNREADABLE | read).items():
        (folder / name).write_bytes(content)
    (folder / "results.csv").write_text('"run\nname",loss\na,2.5\n')
    pandas.DataFrame({"loss": [2.5]}).to_parquet(folder / "results.parquet")
    (folder / "a.py").write_text("x = 1\n")
    (folder / "gone.py").symlink_to("missing")
    prepared = made(request(folder, tmp_path / "corpus", glob="**/*"))
    texts = [text.encode() for text in TEXTS if text]
    assert texts_of(tmp_path / "corpus") == [*texts, *texts, b"x = 1\n", *texts], "a.CSV, a.PARQUET, a.py, lines.json"
    read = "1 CSV, 1 JSON lines, 1 Parquet, 1 text"
    skipped = (
        "1 CSV without the field 'text', 3 JSON without records, 3 JSON without the field 'text', 1 Parquet without "
        "the field 'text', 2 UTF-16, 4 binary, 1 broken link, 1 compressed, 1 folder that cannot be read"
    )
    shown, counts = describe(tmp_path / "corpus", prepared), prepared.as_json()["files"]
    assert f"4 files: {read}\n" in shown and f"17 files skipped: {skipped}; the first: " in shown
    for text, found in ((read, counts["read"]), (skipped, counts["skipped"])):
        assert text == ", ".join(f"{number} {kind}" for kind, number in found.items())
    source = {"path": str(folder), "glob": "**/*"}
    start = f"data.train.0: 127 documents, {3 * sum(map(len, texts)) + 6:,} bytes of text; "
    assert load_datasets(data_config(source)).descriptions == (start + "; ".join(shown.splitlines()[1:3]),)
    text = error_of(DataError, load_datasets, data_config(source | {"glob": "results.*"}))
    assert "has no document with text (0 documents, " in text and " 2 files skipped: 1 CSV without the field" in text


RECORD = b'{"text": "a"}'
TEXTS_LIKE_RECORDS = {
    "app.js.map": b'{"version": 3, "text": "' + b"a" * (5 << 20) + b'"}',
    "array.js": b'[{"version": 3, "text": "' + b"a" * (5 << 20) + b'"}]',
    "log.txt": RECORD + b"\nand then text\n",
    "part-0": RECORD + b"\n" + RECORD + b"\n[not a record]\n",
    "notebook.ipynb": b'{"cells": []}',
    "mixed.log": RECORD + b'\n{"name": "b"}\n',
    "braces.tex": b"{\\bf text}\n",
    "links.md": b"[text](link)\n",
}


@pytest.mark.parametrize("name", TEXTS_LIKE_RECORDS)
def test_files_with_other_content_than_records_are_text(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS_LIKE_RECORDS[name])
    for read in (units(tmp_path / name), units(tmp_path, glob="**/*")):
        assert documents(read) == [TEXTS_LIKE_RECORDS[name].decode()]


@pytest.mark.parametrize(("start", "between", "end"), [("", "\n", ""), ("[", ",\n", "]")], ids=["lines", "array"])
def test_records_may_be_longer_than_the_inspected_head(tmp_path, start, between, end):
    for lengths in ((5 << 20, 1), (1, 5 << 20), (3 << 20, 3 << 20)):
        texts = ["a" * length for length in lengths]
        (tmp_path / "a.json").write_text(start + between.join(json.dumps({"text": text}) for text in texts) + end)
        assert documents(units(tmp_path / "a.json", unit_bytes=1 << 20)) == texts


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
    max_leaves=6,
)
broken = st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode())
names = st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.txt", "a", "a.json.gz", "a.parquet", "a.tsv", "a.zst"])


@given(names, st.lists(broken, max_size=4), st.sampled_from(["utf-8", "utf-16", "latin-1"]))
def test_any_content_is_read_or_refused_in_one_line(tmp_path_factory, name, lines, encoding):
    file = tmp_path_factory.mktemp("fuzz") / name
    content = b"\n".join(lines)
    file.write_bytes(content.decode("latin-1").encode(encoding) if encoding != "utf-8" else content)
    try:
        for unit in units(file):
            assert all(isinstance(document, bytes) for document in unit.documents())
    except DataError as error:
        assert str(file) in str(error) and "\n" not in str(error)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 200), st.booleans())
def test_lines_are_read_once_wherever_the_file_is_cut(tmp_path_factory, sizes, unit_bytes, ends_with_newline):
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    texts = [str(i) * size for i, size in enumerate(sizes)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n" * ends_with_newline)
    read = units(file, unit_bytes)
    assert documents(read) == texts
    locations = [unit.location(index) for unit in read for index, _ in enumerate(unit.documents())]
    assert locations == [f"{file}, line {number}" for number in range(1, len(texts) + 1)]


def test_files_of_a_folder_are_read_in_order_by_kind(tmp_path):
    tree(tmp_path, "b.py", "a/z.py", "a.txt", "c.md")
    write_jsonl(tmp_path / "b.jsonl", TEXTS)
    everything = units(tmp_path, unit_bytes=10**6, glob="**/*")
    assert documents(everything) == ["a.txt", "a/z.py", *TEXTS, "b.py", "c.md"]
    assert [type(unit).__name__ for unit in everything] == ["WholeFiles", "LineRange", "WholeFiles"]
    assert everything[2].location(1) == str(tmp_path / "c.md")
    tree(tmp_path, *(f"{number}.py" for number in range(100)))
    train, validation = (documents(units(tmp_path, glob="[0-9]*.py", split=split)) for split in ("train", "validation"))
    assert 0 < len(validation) < 20 and len(set(train + validation)) == 100


def test_linked_folders_are_read_once_and_hidden_files_only_if_the_pattern_names_them(tmp_path):
    tree(tmp_path / "elsewhere", "x.py", "deep/y.py")
    folder = tmp_path / "folder"
    tree(folder, "z.py", "a/b.py", "a/deep/c.py", ".b.py", ".git/c.py", "a/.e/f.py", ".github/workflows/g.py")
    links = {"link": "../elsewhere", "again": "../elsewhere", "zero": "a", "a/loop": "..", "a/self": "self"}
    for link, target in links.items():
        (folder / link).symlink_to(target)
    for pattern, expected in {
        "**/*.py": ["a/b.py", "a/deep/c.py", "deep/y.py", "x.py", "z.py"],
        "*/*.py": ["a/b.py", "x.py"],
        "*.py": ["z.py"],
        "link/**/*.py": ["deep/y.py", "x.py"],
        ".github/**/*.py": [".github/workflows/g.py"],
        "**/.*.py": [".b.py"],
    }.items():
        assert documents(units(folder, glob=pattern)) == expected


def test_patterns_match_what_pathlib_matches(tmp_path):
    tree(tmp_path, "a.py", "b.txt", "a/a.py", "b/a/a.py", "b/a/c/b.py", "a/b/a.py", "c/b.py", "cc/b.py")
    for pattern in "**/*.py *.py */*.py a/**/* **/a/*.py **/a/**/*.py ?/[ab].py b/a/a.py".split():
        expected = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(pattern) if path.is_file())
        assert documents(units(tmp_path, glob=pattern)) == expected


OPTION_ERRORS = [
    ("", {}, "'{path}' is a folder: select its files with {option}glob"),
    ("", {"glob": "*.py"}, "has no file for {option}glob '*.py'"),
    ("", {"glob": "/*.py"}, "is not a valid pattern"),
    ("", {"glob": "*", "split": "test"}, "{option}split = 'test' is unknown"),
    ("a.txt", {"glob": "*"}, "{option}glob '*' selects files of a folder"),
    ("a.txt", {"split": "train"}, "{option}split = 'train' selects a part"),
    ("missing.txt", {}, "{label} does not exist: name a folder, a file"),
    ("dataset", {"split": "test"}, "has no split 'test', it has train: choose with {option}split"),
]


@pytest.mark.parametrize("key", [None, "data.train.3"])
@pytest.mark.parametrize(("name", "options", "reason"), OPTION_ERRORS)
def test_wrong_options_are_reported_by_option_or_key(tmp_path, name, options, reason, key):
    if name == "dataset":
        SAVED.save_to_disk(tmp_path / name)
    (tmp_path / "a.txt").touch()
    path, option = tmp_path / name, f"{key}." if key else "--"
    label = f"{key}.path = '{path}'" if key else f"INPUT '{path}'"
    assert reason.format(path=path, option=option, label=label) in message(path, ConfigError, key=key, **options)


def test_hub_datasets_come_from_the_datasets_library_if_the_hub_is_reachable(tmp_path, monkeypatch):
    """If it is not, the datasets library would retry for 25 seconds. Only possible names are looked up."""
    load, look_up = Mock(return_value=datasets.Dataset.from_dict({"text": TEXTS})), Mock()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", look_up)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    assert documents(units("some/web", subset="en", split="test")) == TEXTS
    load.assert_called_once_with("some/web", "en", split="test", streaming=False)
    load.side_effect = ConnectionError("Couldn't reach 'no/such' on the Hub\nmore")
    assert message("no/such").endswith("cannot load it: Couldn't reach 'no/such' on the Hub")
    load.reset_mock()
    look_up.side_effect = ConnectionError("no network")
    assert "hub is unreachable (no network)" in message("corpara/web", ConfigError)
    assert "'corpara/web.jsonl' does not exist" in message("corpara/web.jsonl", ConfigError)
    assert not load.called


def test_blank_lines_and_nulls_are_empty_documents_and_bad_bytes_are_kept():
    lines = (b"", b" \r\n", b'{"text": null}', b'{"text": "a\xffb"}')
    assert [parse_line(line, Fields(), None) for line in lines] == [b"", b"", b"", b"a\xffb"]
    half = parse_line(rb'{"text": "\ud83d!"}', Fields(), None)
    with pytest.raises(UnicodeDecodeError):
        half.decode()
    assert encode_text(b"\xff", "text", None) == b"\xff"


def test_stdlib_splits_are_complete_sorted_source_code_by_hash():
    root = Path(sysconfig.get_paths()["stdlib"])
    everything, train, validation = (stdlib_files(split) for split in ("all", "train", "validation"))
    names = [file.relative_to(root).as_posix() for file in everything]
    assert names == sorted(names) and len(names) > 300 and {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any(SKIPPED_FOLDERS & set(Path(name).parts[:-1]) for name in names)
    chosen = [in_validation_split(name) for name in names]
    assert validation == list(compress(everything, chosen)) and 0 < len(validation) < len(everything) / 5
    assert train == [file for file, is_validation in zip(everything, chosen, strict=True) if not is_validation]


@given(st.text(st.characters(codec="utf-8")))
def test_validation_is_the_lowest_twentieth_of_the_hashes(path):
    fraction = int(hashlib.sha256(path.encode()).hexdigest(), 16) / 2**256
    assert in_validation_split(path) == (fraction < 0.05)
