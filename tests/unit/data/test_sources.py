"""What each kind of file and folder becomes: recognized by content and suffix, or refused by name and counted."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config import build_config
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.prepare.progress import describe
from mtp_dist.errors import UserError
from tests.unit.data.preparing import made, request, texts_of
from tests.unit.data.test_text_sources import TEXTS, documents, message, units

RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
BYTE_ORDER_MARK = "\ufeff".encode()


def zstd(content: bytes) -> bytes:
    compressed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(compressed, "zstd") as stream:
        stream.write(content)
    return compressed.getvalue().to_pybytes()


def table(delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue().encode()


def parquet() -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), content)
    return content.getvalue()


FILES_OF_RECORDS: dict[str, Callable[[], bytes]] = {
    "lines.json": lambda: JSON_LINES,
    "array.json": lambda: json.dumps(RECORDS).encode(),
    "indented.json": lambda: json.dumps(RECORDS, indent=2).encode(),
    "marked.jsonl": lambda: BYTE_ORDER_MARK + JSON_LINES,
    "marked.json": lambda: BYTE_ORDER_MARK + json.dumps(RECORDS).encode(),
    "a.JSONL": lambda: JSON_LINES,
    "a.jsonl.GZ": lambda: gzip.compress(JSON_LINES),
    "compressed.jsonl": lambda: gzip.compress(JSON_LINES),
    "array.json.gz": lambda: gzip.compress(json.dumps(RECORDS).encode()),
    "lines.json.bz2": lambda: bz2.compress(JSON_LINES),
    "a.jsonl.xz": lambda: lzma.compress(JSON_LINES),
    "a.jsonl.zst": lambda: zstd(JSON_LINES),
    "part-00000": lambda: JSON_LINES,
    "part-00000.gz": lambda: gzip.compress(JSON_LINES),
    "lines.txt": lambda: JSON_LINES,
    "a.csv": table,
    "marked.csv": lambda: BYTE_ORDER_MARK + table(),
    "a.CSV": table,
    "a.csv.gz": lambda: gzip.compress(table()),
    "a.tsv": lambda: table("\t"),
    "a.PARQUET": parquet,
    "part-0": parquet,
}


@pytest.mark.parametrize("name", FILES_OF_RECORDS)
def test_files_of_records_are_read_record_by_record(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES_OF_RECORDS[name]())
    for read in (units(tmp_path / name), units(tmp_path, glob="**/*")):
        assert documents(read) == TEXTS
    if not name.lower().endswith(("parquet", "part-0")):
        assert len(read) > 3, "one process need not hold all of it"
        assert sum(unit.size for unit in read) == pytest.approx((tmp_path / name).stat().st_size, abs=10)


SETTINGS = json.dumps({"name": "package", "text": "no record"}, indent=2).encode()
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "settings.json": (SETTINGS, "is JSON, but neither one object per line nor an array of objects"),
    "numbers.json": (b"[1, 2, 3]", "is JSON, but neither one object per line nor an array of objects"),
    "other.json": (b'{"content": "a"}\n{"content": "b"}\n', "has no field 'text', it has 'content'"),
    "other.txt": (b'{"content": "a"}\n{"content": "b"}\n', "has no field 'text', it has 'content'"),
    "mixed.json": (b'[{"text": "a"}, {"name": "b"}]', "has no field 'text', it has 'name' in row 1"),
    "deep.json": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is JSON, but neither"),
    "text.txt.GZ": (gzip.compress(b"text " * 99), "is compressed: decompress it"),
    "renamed.txt": (b"PK\x03\x04" + b"text" * 9, "is binary"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is binary"),
    "paper.pdf": (b"%PDF-1.7\nobj", "is binary"),
    "short.bin.txt": (b"\xe1\x01\x02\x03", "is binary"),
    "windows.txt": ("Grüße\n".encode("utf-16"), "is UTF-16"),
    "windows.csv": (table().decode().encode("utf-16"), "is UTF-16"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_as_text_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    content, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} {reason}" in message(tmp_path / name)


def test_what_the_files_of_a_folder_became_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, (content, _) in UNREADABLE.items():
        (folder / name).write_bytes(content)
    for name in ("lines.json", "a.csv", "a.PARQUET"):
        (folder / name).write_bytes(FILES_OF_RECORDS[name]())
    (folder / "results.csv").write_text('"run\nname",loss\na,2.5\n')
    pyarrow.parquet.write_table(pyarrow.table({"loss": [2.5]}), folder / "results.parquet")
    (folder / "a.py").write_text("x = 1\n")
    (folder / "gone.py").symlink_to("missing")
    prepared = made(request(folder, tmp_path / "corpus", glob="**/*"))
    texts = [text.encode() for text in TEXTS if text]
    assert texts_of(tmp_path / "corpus") == [*texts, *texts, b"x = 1\n", *texts], "a.CSV, a.PARQUET, a.py, lines.json"
    files = prepared.as_json()["files"]
    assert files["read"] == {"CSV": 1, "JSON lines": 1, "Parquet": 1, "text": 1}
    assert files["skipped"] == {
        "CSV without the field 'text'": 1,
        "JSON without records": 3,
        "JSON without the field 'text'": 3,
        "Parquet without the field 'text'": 1,
        "UTF-16": 2,
        "binary": 4,
        "broken link": 1,
        "compressed": 1,
    }
    said = describe(tmp_path / "corpus", prepared)
    assert "4 files: 1 CSV, 1 JSON lines, 1 Parquet, 1 text" in said
    assert "16 files skipped: 1 CSV without the field 'text', 3 JSON without records, 3 JSON without the field" in said


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
def test_only_files_whose_every_record_is_known_are_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXTS_LIKE_RECORDS[name])
    for read in (units(tmp_path / name), units(tmp_path, glob="**/*")):
        assert documents(read) == [TEXTS_LIKE_RECORDS[name].decode()]


@pytest.mark.parametrize("brackets", [("", "\n", ""), ("[", ",\n", "]")], ids=["lines", "array"])
def test_records_that_are_longer_than_what_is_looked_at(tmp_path: Path, brackets: tuple[str, str, str]) -> None:
    begin, between, end = brackets
    for lengths in ((5 << 20, 1), (1, 5 << 20), (3 << 20, 3 << 20)):
        texts = ["a" * length for length in lengths]
        (tmp_path / "a.json").write_text(begin + between.join(json.dumps({"text": text}) for text in texts) + end)
        assert documents(units(tmp_path / "a.json")) == texts


def test_a_run_reports_what_the_files_of_its_sources_became(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    tree(folder, "a.py", "b.py")
    (folder / "picture.py").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")

    def load(glob: str) -> tuple[str, ...]:
        model = {"hidden_size": 8, "trunk_layers": 1, "num_attention_heads": 1}
        train = {"steps": 5, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 4}
        data = {"train": [{"path": str(folder), "glob": glob}]}
        return load_datasets(
            build_config({"model": model, "heads": {"count": 1}, "data": data, "train": train})
        ).notices

    with pytest.raises(UserError, match=r"has no document with text \(0 documents, .* 1 files skipped: 1 binary"):
        load("p*.py")
    assert load("*.py") == (
        "data.train.0: 2 documents, 8 bytes of text; 2 files: 2 text; 1 files skipped: 1 binary; the first: "
        f"{folder / 'picture.py'}",
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"id,content\n1,a\n", "has no field 'text', it has 'id', 'content'"),
        (b"text,text\na,b\n", "has 2 fields 'text'"),
        (b"id,text\n1,a\n2\n", "line 3 has 1 fields, the header has 2"),
        (b'id,text\n1,a\n2,"b\n', "is not CSV that can be read (unexpected end of data)"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert f"{tmp_path / 'a.csv'}" in (said := message(tmp_path / "a.csv")) and reason in said


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_that_were_cut_off_are_named(tmp_path: Path, suffix: str) -> None:
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}[suffix]
    content = compress(JSON_LINES)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(content[: len(content) // 2])
    assert f"a.jsonl.{suffix} is not a complete " in message(tmp_path / f"a.jsonl.{suffix}")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
    max_leaves=6,
)
broken = st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode())
names = st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.txt", "a", "a.json.gz", "a.parquet", "a.tsv", "a.zst"])


@given(names, st.lists(broken, max_size=4), st.sampled_from(["utf-8", "utf-16", "latin-1"]))
def test_any_content_under_any_name_is_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, name: str, lines: list[bytes], encoding: str
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / name
    content = b"\n".join(lines)
    file.write_bytes(content.decode("latin-1").encode(encoding) if encoding != "utf-8" else content)
    try:
        for unit in units(file):
            assert all(isinstance(document, bytes) for document in unit.documents())
    except UserError as error:
        assert str(file) in str(error) and "\n" not in str(error)


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_linked_folders_are_read_once_by_every_pattern(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", "x.py", "deep/y.py")
    folder = tmp_path / "folder"
    tree(folder, "a/b.py", "a/deep/c.py")
    (folder / "link").symlink_to("../elsewhere")
    (folder / "again").symlink_to("../elsewhere")
    (folder / "a" / "loop").symlink_to("..")
    (folder / "a" / "self").symlink_to("self")
    (folder / "zero").symlink_to("a")
    everything = ["a/b.py", "a/deep/c.py", "x.py", "deep/y.py"]
    assert sorted(documents(units(folder, glob="**/*.py"))) == sorted(everything)
    assert sorted(documents(units(folder, glob="*/*.py"))) == ["a/b.py", "x.py"]
    assert documents(units(folder, glob="link/**/*.py")) == ["deep/y.py", "x.py"]


def test_hidden_files_are_left_out_unless_the_pattern_names_them(tmp_path: Path) -> None:
    tree(tmp_path, "a.py", ".b.py", ".git/c.py", "d/.e/f.py", ".github/workflows/g.py")
    assert documents(units(tmp_path, glob="**/*.py")) == ["a.py"]
    assert documents(units(tmp_path, glob="*.py")) == ["a.py"]
    assert documents(units(tmp_path, glob=".github/**/*.py")) == [".github/workflows/g.py"]
    assert documents(units(tmp_path, glob="**/.*.py")) == [".b.py"]


@given(st.sampled_from(["**/*.py", "*.py", "*/*.py", "a/**/*", "**/a/*.py", "**/a/**/*.py", "?/[ab].py", "b/a/a.py"]))
def test_patterns_choose_what_pathlib_chooses(tmp_path_factory: pytest.TempPathFactory, pattern: str) -> None:
    folder = tmp_path_factory.mktemp("tree")
    tree(folder, "a.py", "b.txt", "a/a.py", "b/a/a.py", "b/a/c/b.py", "a/b/a.py", "c/b.py", "cc/b.py")
    chosen = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())
    assert documents(units(folder, glob=pattern)) == chosen


def test_folders_that_cannot_be_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "folder", "a.py", "closed/b.py")
    really_scan = os.scandir

    def scan(path: Path) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scan)
    prepared = made(request(tmp_path / "folder", tmp_path / "corpus", glob="**/*.py"))
    assert prepared.as_json()["files"]["skipped"] == {"folder that cannot be read": 1}
