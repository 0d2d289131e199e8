"""Samples of a stream are those of its documents packed whole, wherever it was stopped and at any layout."""

import gzip
import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.sources.text_sources import InputOptions, open_inputs
from mtp_dist.data.streaming import StreamedSamples, TokenStream
from mtp_dist.data.tokenizer import ByteTokenizer
from mtp_dist.errors import UserError
from tests.tiny import tiny_config

LENGTH, LOOKAHEAD = 7, 3


def documents_of(seed: int, count: int = 40) -> list[str]:
    random = Random(seed)
    return ["abcdefghij"[: random.randrange(0, 11)] * random.randrange(1, 4) for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": document, "id": 7}) + "\n" for document in documents))
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("stream") / "documents.jsonl", documents_of(1))


def stream_of(path: str, **options: Any) -> TokenStream:
    source = open_inputs([path], InputOptions(key="data.train.0", streaming=True, **options))[0]
    return TokenStream(source, ByteTokenizer(), f"data.train.0.path = '{path}'")


def samples_of(*paths: str, weights: tuple[float, ...] = (1.0,)) -> StreamedSamples:
    return StreamedSamples([[stream_of(path)] for path in paths], weights, LENGTH, LOOKAHEAD)


def packed(documents: list[str], passes: int) -> np.ndarray:
    """All whole samples of the documents, several times over."""
    tokens = [token for text in documents if text for token in (*text.encode(), 256)] * passes
    count = (len(tokens) - LOOKAHEAD) // LENGTH
    return np.stack([tokens[i * LENGTH : i * LENGTH + LENGTH + LOOKAHEAD] for i in range(count)])


def test_samples_are_the_documents_in_their_order_over_and_over(path: str) -> None:
    expected = packed(documents_of(1), 3)
    samples = samples_of(path)
    assert np.array_equal(samples.read(0, len(expected)), expected)
    assert samples.epochs(0) == [2.0], "the third pass has not been read to its end"


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
def test_goes_on_from_any_state(path: str, reads: list[int], data: st.DataObject) -> None:
    """As if killed after each read, the state going through JSON."""
    expected = packed(documents_of(1), 12)
    samples, first = samples_of(path), 0
    for count in reads:
        skipped = data.draw(st.integers(0, 9))  # samples of other ranks
        assert np.array_equal(samples.read(first + skipped, count), expected[first + skipped :][:count])
        first += skipped + count
        state = json.loads(json.dumps(samples.state()))
        samples = samples_of(path)
        samples.restore(state, first, [0])


def test_a_blend_takes_each_source_in_its_own_order(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{seed}.jsonl", documents_of(seed)) for seed in (1, 2)]
    samples = samples_of(*paths, weights=(3.0, 1.0))
    read = samples.read(0, 40)
    sources, occurrences = samples.blend.locate(0, 40)
    expected = [packed(documents_of(seed), 4) for seed in (1, 2)]
    assert all(np.array_equal(read[i], expected[sources[i]][occurrences[i]]) for i in range(40))
    state = samples.state()
    other = samples_of(*paths, weights=(3.0, 1.0))
    other.restore(state, 40, [0, 1])
    assert np.array_equal(other.read(40, 20), samples.read(40, 20))


def test_a_state_from_before_there_were_shards_is_read(path: str) -> None:
    """It is rank 0's, which was then the first to have its part of the step."""
    stream = stream_of(path)
    for _ in range(4):
        stream.take(LENGTH + LOOKAHEAD, LENGTH)
    for rank in range(2):
        samples = samples_of(path)
        samples.restore(json.loads(json.dumps({"next": 4, "streams": [stream.state()]})), 8, [0])
        assert np.array_equal(samples.read(8, 8, rank, 2), packed(documents_of(1), 3)[8 + 4 * rank :][:4])


def test_any_kind_of_file_can_be_streamed(tmp_path: Path) -> None:
    documents = [text for text in documents_of(3) if text]
    (tmp_path / "code").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "code" / f"{number:03}.py").write_text(text)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"content": text}) + "\n" for text in documents)
    pyarrow.parquet.write_table(pyarrow.table({"content": documents}), tmp_path / "d.parquet")
    datasets.Dataset.from_dict({"content": documents}).save_to_disk(tmp_path / "saved", num_shards=3)
    streams = [
        stream_of(str(tmp_path / "saved"), field="content"),
        stream_of(str(tmp_path / "code"), glob="*.py"),
        stream_of(str(tmp_path / "d.jsonl.gz"), field="content"),
        stream_of(str(tmp_path / "d.parquet"), field="content"),
    ]
    expected = packed(documents, 3)
    for stream in streams:
        first = StreamedSamples([[stream]], [1.0], LENGTH, LOOKAHEAD)
        assert np.array_equal(first.read(0, 100), expected[:100])
        state = json.loads(json.dumps(first.state()))
        rest = first.read(100, len(expected) - 100)
        assert np.array_equal(rest, expected[100:])
        first.restore(state, 100, [0])
        assert np.array_equal(first.read(100, len(expected) - 100), rest)
        assert len(json.dumps(state)) < 2000, "a position, no text"


def test_a_stream_without_text_or_field_is_an_error(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"data\.train\.0\.path = '.*empty\.jsonl' has no document with text"):
        samples_of(empty).read(0, 1)
    full = write_jsonl(tmp_path / "full.jsonl", ["x" * 99])
    with pytest.raises(UserError, match=r"data\.train\.0\.path = .*, line 1 has no field 'body', it has 'text'"):
        stream_of(full, field="body").take(4, 2)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": ')
    with pytest.raises(UserError, match=r"data\.train\.0\.path = .*bad\.jsonl, line 2 is not JSON"):
        stream_of(str(tmp_path / "bad.jsonl")).take(9, 2)
    with pytest.raises(UserError, match=r"data\.train\.0\.path = '.*missing\.jsonl' does not exist"):
        stream_of(str(tmp_path / "missing.jsonl"))


def write_parquet(path: Path, documents: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)


def write_compressed(path: Path, documents: list[str]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in documents).encode()))


WRITERS = {
    "a.txt": lambda path, documents: path.write_text("".join(documents)),
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_compressed,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_vanishes_is_named(tmp_path: Path, name: str) -> None:
    """Of two files the second, after the first was read."""
    folder = tmp_path / "stream"
    for part in ("first", "second"):
        (folder / part).mkdir(parents=True)
        WRITERS[name](folder / part / name, documents_of(1))
    samples = StreamedSamples([[stream_of(str(folder), glob=f"**/{name}")]], (1.0,), LENGTH, LOOKAHEAD)
    samples.read(0, 2)
    (folder / "second" / name).unlink()
    with pytest.raises(UserError) as error:
        samples.read(2, 1000)
    said = str(error.value)
    assert said.startswith(f"data.train.0.path = '{folder}': cannot read {folder / 'second' / name} (")
    assert str(folder / "first") not in said


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, name: str) -> None:
    """Between two passes; a line less is no line that is damaged."""
    file = tmp_path / name
    WRITERS[name](file, documents_of(1))
    stream = stream_of(str(file))
    stream.take(10, 5)
    content = file.read_bytes()
    file.write_bytes(content[: content[:-1].rindex(b"\n") + 1] if name == "a.jsonl" else content[:-20])
    with pytest.raises(UserError, match=r"was cut off|is no whole Parquet file") as error:
        for _ in range(1000):
            stream.take(10, 5)
    assert str(file) in str(error.value)


def test_a_parquet_file_that_is_cut_off_before_its_rows_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, documents_of(1))
    [unit] = open_inputs([str(file)], InputOptions())[0].units(1 << 20)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet is no whole Parquet file"):
        list(unit.documents())


def older_folder(folder: Path) -> str:
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n" * 3)
    (folder / "b.txt").write_text("{braces} are text\n")
    (folder / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "d.md").write_text("[a link](b)\n")
    (folder / "e.txt").write_text('{"text": "a line"}\nand a text\n')
    return str(folder)


OLDER_STATE = {"next": 6, "streams": [{"passes": 0, "position": [2, 0], "offset": 2}]}
OLDER_FINGERPRINT = "e4d88ebb5fac5c27a779e5a75a1f615cc251e70330b108f5f4c8667f18dac96c"
OLDER_SAMPLES = [b" link](b)", [*b")\n", 256, *b'{"text'], b't": "a li', b'ine"}\nand']


def test_a_folder_whose_kinds_are_those_of_their_names_resumes_from_an_older_checkpoint(tmp_path: Path) -> None:
    """Its units were told apart by names alone; state, fingerprint and samples are what that version wrote."""
    source = {"path": older_folder(tmp_path / "folder"), "glob": "*", "stream": True}
    config = tiny_config(
        data={"train": [source]},
        train={"global_batch_size": 2, "micro_batch_size": 1, "sequence_length": 8},
        heads={"count": 1},
    )
    datasets = load_datasets(config)
    state = {"read": 6, "fingerprints": [OLDER_FINGERPRINT], "train": OLDER_STATE}
    assert datasets.restore(state, may_change=False) == 6
    assert datasets.train.read(6, 4).tolist() == [list(sample) for sample in OLDER_SAMPLES]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.json", b'{"text": "one"}\n'),
        ("f.csv", b"text\none\n"),
        ("f.txt", b'{"text": "one"}\n'),
        ("f.txt", b"\0\1"),
        ("f.csv", b"name\none\n"),
        ("f.JSONL", b'{"text": "one"}\n'),
    ],
)
def test_a_folder_whose_files_were_once_read_otherwise_does_not_resume(
    tmp_path: Path, name: str, content: bytes
) -> None:
    folder = Path(older_folder(tmp_path / "folder"))
    (folder / name).write_bytes(content)
    older = [[file.name, file.stat().st_size] for file in sorted(folder.iterdir(), key=lambda file: file.name)]
    fingerprint = hashlib.sha256(json.dumps(older).encode()).hexdigest()
    datasets = load_datasets(tiny_config(data={"train": [{"path": str(folder), "glob": "*", "stream": True}]}))
    with pytest.raises(UserError, match=r"^data\.train\.0 has other data than the run was trained on so far"):
        datasets.restore({"read": 6, "fingerprints": [fingerprint], "train": OLDER_STATE}, may_change=False)
