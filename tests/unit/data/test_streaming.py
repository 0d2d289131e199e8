"""Samples of a stream are those of its packed documents, at any layout and wherever it was stopped."""

import hashlib
import json
from random import Random
from unittest.mock import Mock

import numpy as np
import pandas
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_dist.config.notices import notices
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.sources import dataset_input, files_input
from mtp_dist.data.sources.input import InputOptions
from mtp_dist.data.sources.open_inputs import open_inputs
from mtp_dist.data.streaming import StreamedSamples, TokenStream, merge_states
from mtp_dist.data.tokenizer import ByteTokenizer
from mtp_dist.errors import ConfigError, DataError
from tests.tiny import at_world_size
from tests.unit.data.preparing import data_config, error_of, write_jsonl

LENGTH, LOOKAHEAD = 7, 3
BATCH, SHARD_LENGTH = 12, 5
UNIT_BYTES = 300


@pytest.fixture(scope="module", autouse=True)
def small_units():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_input, "UNIT_BYTES", UNIT_BYTES)
        yield


def random_texts(letter="a", count=200):
    random = Random(letter)
    return [f"{letter}{number}" * random.randrange(0, 7) for number in range(count)]


def write_stream(file, letter="a", count=200):
    return {"path": str(write_jsonl(file, random_texts(letter, count))), "stream": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("stream") / "documents.jsonl")


def stream_of(path, **options):
    source = open_inputs([str(path)], InputOptions(key="data.train.0", streaming=True, **options))[0]
    return TokenStream(source, ByteTokenizer(), f"data.train.0.path = '{path}'")


def samples_of(*paths, weights=(1.0,), **options):
    return StreamedSamples([[stream_of(path, **options)] for path in paths], weights, LENGTH, LOOKAHEAD)


def packed(texts, passes):
    """Return all full samples of some passes over the documents."""
    tokens = [token for text in texts if text for token in (*text.encode(), 256)] * passes
    count = (len(tokens) - LOOKAHEAD) // LENGTH
    return np.stack([tokens[i * LENGTH : i * LENGTH + LENGTH + LOOKAHEAD] for i in range(count)])


def through_json(state):
    return json.loads(json.dumps(state))


@settings(max_examples=15)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=4), st.data())
def test_samples_are_the_packed_documents_from_any_state(source, reads, data):
    expected = packed(random_texts(), 5)
    samples, first = samples_of(source["path"]), 0
    for count in reads:
        skipped = data.draw(st.integers(0, 9))  # samples of other ranks
        assert np.array_equal(samples.read(first + skipped, count), expected[first + skipped :][:count])
        first += skipped + count
        state = through_json(samples.state())
        samples = samples_of(source["path"])
        samples.restore(state, first, [0])


def test_blend_reads_each_source_in_its_own_order(tmp_path):
    paths = [write_jsonl(tmp_path / letter, random_texts(letter, 40)) for letter in "ab"]
    samples = samples_of(*paths, weights=(3.0, 1.0))
    read = samples.read(0, 40)
    sources, occurrences = samples.blend.locate(0, 40)
    expected = [packed(random_texts(letter, 40), 4) for letter in "ab"]
    assert all(np.array_equal(read[i], expected[sources[i]][occurrences[i]]) for i in range(40))
    other = samples_of(*paths, weights=(3.0, 1.0))
    other.restore(samples.state(), 40, [0, 1])
    assert np.array_equal(other.read(40, 20), samples.read(40, 20))


def test_states_without_shards_are_read(source):
    """Such a state is rank 0's, which had the first part of the step."""
    stream = stream_of(source["path"])
    for _ in range(4):
        stream.next_tokens(LENGTH + LOOKAHEAD, LENGTH)
    for rank in range(2):
        samples = samples_of(source["path"])
        samples.restore(through_json({"next": 4, "streams": [stream.state()]}), 8, [0])
        assert np.array_equal(samples.read(8, 8, rank, 2), packed(random_texts(), 3)[8 + 4 * rank :][:4])


def write(path, texts, field="text"):
    """Write documents as the kind that the name implies."""
    frame = pandas.DataFrame({field: texts})
    if path.suffix == ".txt":
        path.write_text("".join(texts))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix:
        frame.to_json(path, orient="records", lines=True)  # compressed if the suffix is .gz
    elif path.name == "saved":
        Dataset.from_pandas(frame).save_to_disk(path, num_shards=3)
    else:
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number:03}.py").write_text(text)


@pytest.mark.parametrize("name", ["code", "saved", "a.jsonl.gz", "a.parquet"])
def test_any_kind_of_source_can_be_streamed(tmp_path, name):
    texts = [text for text in random_texts() if text]
    write(tmp_path / name, texts, "content")
    samples = samples_of(tmp_path / name, **({"glob": "*.py"} if name == "code" else {"field": "content"}))
    expected = packed(texts, 3)
    assert np.array_equal(samples.read(0, 100), expected[:100])
    state = through_json(samples.state())
    for _ in range(2):
        assert np.array_equal(samples.read(100, len(expected) - 100), expected[100:])
        assert samples.epochs(0) == [2.0], "the third pass has not been read to its end"
        samples.restore(state, 100, [0])
    assert len(json.dumps(state)) < 2000, "a position without text"


def test_bad_documents_are_reported_with_the_key(tmp_path):
    file = tmp_path / "a.jsonl"
    for content, reason in (
        ('{"text": ""}\n\n', "' has no document with text"),
        ('{"body": "full"}\n', ", line 1 has no field 'text', it has 'body'"),
        ('{"text": "fine"}\n{"text": ', ", line 2 is not valid JSON"),
    ):
        file.write_text(content)
        text = error_of(DataError, stream_of(file).next_tokens, 9, 2)
        assert text.startswith(f"data.train.0.path = '{file}") and reason in text


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_file_that_vanishes_is_reported(tmp_path, name):
    """The second of two files, after the first was read."""
    for part in ("first", "second"):
        (tmp_path / part).mkdir()
        write(tmp_path / part / name, random_texts())
    samples = samples_of(tmp_path, glob=f"**/{name}")
    samples.read(0, 2)
    (tmp_path / "second" / name).unlink()
    text = error_of(DataError, samples.read, 2, 1000)
    assert text.startswith(f"data.train.0.path = '{tmp_path}': cannot read {tmp_path / 'second' / name} (")
    assert str(tmp_path / "first") not in text


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_truncated_file_is_reported(tmp_path, name):
    """Between two passes, at the end of a line; and of a Parquet file before the rows of a unit are read."""
    file = tmp_path / name
    write(file, random_texts())
    stream = stream_of(file)
    stream.next_tokens(10, 5)
    [unit] = open_inputs([str(file)], InputOptions())[0].units(1 << 20)
    content = file.read_bytes()
    file.write_bytes(content[: content[:-1].rindex(b"\n") + 1] if name == "a.jsonl" else content[:-20])
    reason = "it was truncated" if name == "a.jsonl" else "is not a valid Parquet file"
    for read in (lambda: [stream.next_tokens(10, 5) for _ in range(1000)], lambda: list(unit.documents())):
        text = error_of(DataError, read)
        assert str(file) in text and reason in text


OLDER_STATE = {"next": 6, "streams": [{"passes": 0, "position": [2, 0], "offset": 2}]}
OLDER_SAMPLES = [b" link](b)", [*b")\n", 256, *b'{"text'], b't": "a li', b'ine"}\nand']
RECORD = b'{"text": "one"}\n'
OTHER_KINDS = [("f.json", RECORD), ("f.txt", RECORD), ("f.JSONL", RECORD), ("f.csv", b"text\n1\n"), ("f.txt", b"\0\1")]


@pytest.mark.parametrize(("name", "content"), [(None, b""), *OTHER_KINDS])
def test_older_checkpoint_of_a_folder_resumes_only_if_names_imply_the_kinds(tmp_path, name, content):
    """Its kinds came from names alone; state, fingerprint and samples are what that version wrote."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n" * 3)
    (folder / "b.txt").write_text("{braces} are text\n")
    (folder / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "d.md").write_text("[a link](b)\n")
    (folder / "e.txt").write_text('{"text": "a line"}\nand a text\n')
    if name:
        (folder / name).write_bytes(content)
    older = [[file.name, file.stat().st_size] for file in sorted(folder.iterdir())]
    fingerprint = hashlib.sha256(json.dumps(older).encode()).hexdigest()
    source = {"path": str(folder), "glob": "*", "stream": True}
    datasets = load_datasets(data_config(source, heads=1, global_batch_size=2))
    state = {"read": 6, "fingerprints": [fingerprint], "train": OLDER_STATE}
    if name:
        text = error_of(ConfigError, datasets.restore, state, may_change=False)
        assert text.startswith("data.train.0 differs from the data that the run was trained on so far")
    else:
        assert fingerprint == "e4d88ebb5fac5c27a779e5a75a1f615cc251e70330b108f5f4c8667f18dac96c"
        assert datasets.restore(state, may_change=False) == 6
        assert datasets.train.read(6, 4).tolist() == [list(sample) for sample in OLDER_SAMPLES]


def sharded(shards, *sources, length=SHARD_LENGTH):
    return data_config(sources, data={"stream_shards": shards}, global_batch_size=BATCH, sequence_length=length)


def documents_of_shards(source, shards):
    units = list(open_inputs([source["path"]], InputOptions())[0].units(UNIT_BYTES))
    assert len(units) > 2 * shards
    return [[text for unit in units[shard::shards] for text in unit.documents()] for shard in range(shards)]


class Ranks:
    """The data-parallel ranks of a run, each with its own samples."""

    def __init__(self, config, number, state=None):
        self.datasets = [load_datasets(config) for _ in range(number)]
        self.samples_read = 0
        for datasets in self.datasets:
            datasets.tokenizer.encode_documents = Mock(wraps=datasets.tokenizer.encode_documents)
            self.samples_read = datasets.restore(state, may_change=False) if state else 0

    def read(self, steps):
        """Return the samples of the next steps, [steps, BATCH, S + n], those of a step in a canonical order."""
        batches = []
        for _ in range(steps):
            num_ranks, first = len(self.datasets), self.samples_read
            parts = [data.train.read(first, BATCH, rank, num_ranks) for rank, data in enumerate(self.datasets)]
            assert {len(part) for part in parts} == {BATCH // num_ranks}
            batch = np.concatenate(parts)
            batches.append(batch[np.lexsort(batch.T)])
            self.samples_read += BATCH
        return np.stack(batches)

    def state(self):
        """Return the state in a checkpoint."""
        merged = merge_states([datasets.train.state() for datasets in self.datasets])
        return through_json(self.datasets[0].state(self.samples_read, merged))

    def tokenized(self):
        """Return the documents with text that each rank has tokenized."""
        calls = [datasets.tokenizer.encode_documents.call_args_list for datasets in self.datasets]
        return [[text for call in of_rank for text in call.args[0] if text] for of_rank in calls]


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 4, 6]), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
def test_samples_are_the_same_at_every_layout_and_over_kills(source, shards, runs):
    """Each run reads some steps and is killed; its number of ranks need not divide the shards."""
    config = sharded(shards, source)
    expected = Ranks(config, 1).read(sum(steps for _, steps in runs))
    found, state = [], None
    for number, steps in runs:
        ranks = Ranks(config, number, state)
        found.append(ranks.read(steps))
        state = ranks.state()
        ranks.read(1)  # a step that is lost
    assert np.array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_sample_i_comes_from_shard_i_modulo_their_number(source, shards):
    """A shard is every K-th work unit, packed by itself."""
    samples = load_datasets(sharded(shards, source)).train.read(0, 60)
    for shard, documents in enumerate(documents_of_shards(source, shards)):
        tokens = ByteTokenizer().encode_documents(documents)[0]
        for number, sample in enumerate(samples[shard::shards]):
            assert np.array_equal(sample, tokens[number * SHARD_LENGTH :][: SHARD_LENGTH + 2])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_document_is_tokenized_by_one_rank(source, ranks):
    run = Ranks(sharded(4, source), ranks)
    run.read(9)
    documents = [text for texts in run.tokenized() for text in texts]
    assert len(set(documents)) == len(documents) > 40
    amounts = [sum(map(len, texts)) for texts in run.tokenized()]
    assert max(amounts) < 1.5 * sum(amounts) / ranks


def test_blend_keeps_its_proportions_in_every_batch_and_shard(tmp_path):
    weights = {"a": 3.0, "b": 1.0}
    files = {letter: write_jsonl(tmp_path / f"{letter}.jsonl", [letter * 99] * 40) for letter in weights}
    sources = [{"path": str(files[letter]), "stream": True, "weight": weights[letter]} for letter in weights]
    from_second = (load_datasets(sharded(4, *sources)).train.read(0, 8 * BATCH) == ord("b")).any(axis=1)
    assert from_second.reshape(-1, BATCH).sum(axis=1).tolist() == [3] * 8
    assert from_second.reshape(-1, 4).sum(axis=0).tolist() == [6] * 4


@pytest.mark.parametrize("saved", [True, False])
def test_datasets_are_sharded_too(tmp_path, saved, monkeypatch):
    dataset = Dataset.from_dict({"text": [f"text {number:02}" * 3 for number in range(90)]})
    dataset.save_to_disk(tmp_path / "saved")
    if not saved:  # like a hub dataset in 9 files
        monkeypatch.setattr(dataset_input, "load_dataset", lambda *_: dataset.to_iterable_dataset(num_shards=9))
    source = {"path": str(tmp_path / "saved"), "stream": True}
    config, run = sharded(3, source), Ranks(sharded(3, source), 3)
    first = run.read(4)
    resumed = Ranks(config, 1, run.state())
    assert np.array_equal(np.concatenate([first, resumed.read(4)]), Ranks(config, 1).read(8))
    documents = [text for texts in run.tokenized() for text in texts]
    assert len(set(documents)) == len(documents) and all(run.tokenized())
    text = error_of(ConfigError, load_datasets(sharded(100 if saved else 10, source)).train.read, 0, BATCH)
    assert f"saved' has only {'90 documents' if saved else '9 files'}: data.stream_shards" in text


def test_wrong_numbers_of_shards_are_refused(tmp_path, source):
    small = write_stream(tmp_path / "small.jsonl", "a", count=10)
    text = error_of(DataError, load_datasets(sharded(4, small)).train.read, 0, BATCH)
    assert "small.jsonl' has no document with text in shard 1 of 4: lower data.stream_shards" in text
    run = Ranks(sharded(4, source), 1)
    run.read(1)
    text = error_of(ConfigError, Ranks, sharded(2, source), 1, run.state())
    assert text.startswith("data.stream_shards is 2, the checkpoint's streams have 4 shards: set it back")


def test_resume_with_other_streams_keeps_the_position_of_each(tmp_path, source):
    """In each shard, also if weights and the sequence length change."""
    other = write_stream(tmp_path / "other.jsonl", "b")
    before = load_datasets(sharded(2, source))
    earlier = before.train.read(0, BATCH)
    after = load_datasets(sharded(2, other, source | {"weight": 2.0}, length=9))
    state = through_json(before.state(BATCH, before.train.state()))
    later = after.train.read(after.restore(state, may_change=True), BATCH)
    for shard, documents in enumerate(documents_of_shards(source, 2)):
        continued = [sample[:9] for sample in later[shard::2] if ord("a") in sample]
        assert len(continued) == 4
        tokens = np.concatenate([*(sample[:SHARD_LENGTH] for sample in earlier[shard::2]), *continued])
        assert np.array_equal(tokens, ByteTokenizer().encode_documents(documents)[0][: len(tokens)])


@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (4, 2), (6, 6), (12, 6)])
def test_notice_if_ranks_tokenize_more_than_their_part(source, shards, parts):
    lines = notices(at_world_size(sharded(shards, source), 6), 257)
    assert [line for line in lines if line.startswith("data.stream_shards")] == [
        f"data.stream_shards = {shards} is not a multiple of the data-parallel degree 6: each rank tokenizes "
        f"1/{parts} of the stream instead of 1/6"
    ] * (parts < 6)
