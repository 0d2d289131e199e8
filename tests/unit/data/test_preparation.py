"""`prepare` makes the same bytes whatever happens on the way, and reports progress, results and errors in lines."""

import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import psutil
import pytest
import tokenizers
from rich.console import Console

from mtp_dist.cli import data_tables
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.prepare.corpus_writer import JOURNAL, LENGTHS, TOKENS
from mtp_dist.data.prepare.prepare import PLAN, prepare
from mtp_dist.data.prepare.tokenize import UnitSummary
from mtp_dist.data.tokenizer import id_dtype
from mtp_dist.errors import ConfigError, DataError
from tests.unit.data.preparing import Recorder, digests, documents_of, error_of, made, request, texts_of, write_jsonl


@pytest.fixture
def corpus(tmp_path):
    """A folder of 60 files of 0.1 to 3 kB, every tenth one empty."""
    numbers = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(60):
        lines = numbers.randrange(5, 120) if index % 10 else 0
        text = "".join(f"x{numbers.randrange(1000)} = {numbers.randrange(1000)}  # é\n" for _ in range(lines))
        (folder / f"{index:02d}.py").write_text(text)
    return folder


def message(asked, kind=DataError):
    """Return the error of a preparation, which changes nothing under the final names."""
    before = digests(asked.prefix)
    text = error_of(kind, made, asked)
    assert digests(asked.prefix) == before
    return text


def units_in(asked):
    """Return how many work units have been added to the unfinished corpus."""
    return sum(journal.read_bytes().count(b"\n") for journal in asked.folder.glob(JOURNAL))


def interrupt(asked):
    """Prepare three units."""
    with pytest.raises(KeyboardInterrupt):
        made(asked, Recorder(Mock(side_effect=[None, None, KeyboardInterrupt])))


@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json", "tokenizer.model"])
def test_result_does_not_depend_on_workers_or_work_units(corpus, tmp_path, trained_tokenizers, tokenizer):
    name = tokenizer if tokenizer == "bytes" else str(trained_tokenizers / tokenizer)
    prefixes = []
    for workers, unit_bytes in ((1, 2000), (2, 2000), (2, 1), (2, 10**6)):
        prefixes.append(tmp_path / f"{workers}_{unit_bytes}")
        prepared = made(request(corpus, prefixes[-1], name, workers, unit_bytes, glob="*.py"))
    assert all(digests(prefix)[".bin"] == digests(prefixes[0])[".bin"] for prefix in prefixes)
    assert digests(prefixes[0]) == digests(prefixes[1]) and set(digests(prefixes[0])) == {".bin", ".idx", ".json"}

    texts = [file.read_bytes() for file in sorted(corpus.iterdir())]
    built = build_tokenizer(name)
    assert documents_of(prefixes[0]) == [built.encode(text).tolist() for text in texts if text]
    description = prepared.description
    assert description.documents == 54 and description.bytes == sum(map(len, texts))
    assert description.tokenizer.sha256 == built.fingerprint
    assert description.empty_documents == 6 and prepared.first_empty == str(corpus / "00.py")


def test_ids_take_two_bytes_if_they_fit_and_four_in_large_vocabularies(tmp_path, trained_tokenizers):
    assert [id_dtype(size) for size in (257, 65499, 65500, 200_000)] == [np.uint16, np.uint16, np.int32, np.int32]
    large = tokenizers.Tokenizer.from_file(str(trained_tokenizers / "tokenizer.json"))
    large.add_tokens([f"<{i}>" for i in range(303, 70_000)])
    large.save(str(tmp_path / "large.json"))
    made(request(write_jsonl(tmp_path / "a.jsonl", ["a<69999>", "b"]), tmp_path / "a", tmp_path / "large.json"))
    assert documents_of(tmp_path / "a")[0][1] == 69_999


def test_kills_at_random_moments_leave_no_trace(corpus, tmp_path):
    made(request(corpus, tmp_path / "whole", glob="*.py"))
    asked = request(corpus, tmp_path / "killed", workers=2, glob="*.py")
    moments, kills_with_units = random.Random(1), 0
    for _ in range(3):
        before = units_in(asked)
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=prepare, args=(asked, Recorder(partial(time.sleep, 0.03))))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and units_in(asked) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.join()
        kills_with_units += units_in(asked) > 0
        names = set(digests(asked.prefix))
        assert ".json" not in names or names == {".bin", ".idx", ".json"}
    if asked.folder.exists():
        made(asked)
    assert kills_with_units >= 2
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_complete_units_are_not_encoded_again(tmp_path):
    """Also those of a streamed dataset."""
    texts = [f"text {i} " * 30 for i in range(60)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "set")
    asked = request(tmp_path / "set", tmp_path / "a", streaming=True)
    interrupt(asked)
    assert not digests(asked.prefix)
    made(asked, recorder := Recorder())
    assert recorder.reused[:4] == [True] * 3 + [False] and len(recorder.reused) > 6 and recorder.total is None
    assert texts_of(tmp_path / "a") == [text.encode() for text in texts]


def test_unfinished_folder_of_another_corpus_is_refused(corpus, tmp_path):
    bad = write_jsonl(tmp_path / "a.jsonl", ["good"] * 300)
    bad.write_text(bad.read_text() + "bad\n")
    asked = request([corpus, bad], tmp_path / "a", glob="*.py")
    assert f"{bad}, line 301 is not valid JSON" in message(asked)
    assert (units := units_in(asked))
    for other, reason in (
        (request([corpus, bad], tmp_path / "a", glob="*1.py"), "other options (glob: '*.py', now '*1.py')"),
        (request([corpus], tmp_path / "a", glob="*.py"), "other inputs"),
        (request([corpus, bad], tmp_path / "a", glob="*.py", invalid_utf8="skip"), "other invalid UTF-8"),
    ):
        text = message(other, ConfigError)
        assert f"'{asked.folder}' was started with {reason}" in text and "delete that folder" in text
    write_jsonl(bad, ["good"])
    assert f"other files and datasets ({bad} has changed)" in message(asked, ConfigError)
    assert units_in(asked) == units
    shutil.rmtree(asked.folder)
    made(asked)


def test_existing_corpus_and_another_process_are_not_disturbed(tmp_path):
    asked = request(write_jsonl(tmp_path / "a.jsonl", ["a"]), tmp_path / "a.corpus")
    others = []
    made(asked, Recorder(lambda: others.append(error_of(ConfigError, made, asked))))
    assert others == [f"another process is preparing '{asked.prefix}': wait, or choose another --to"]
    assert texts_of(asked.prefix) == [b"a"]
    text = message(asked, ConfigError)
    assert f"{asked.prefix}.bin exists: delete it, or choose another" in text and not asked.folder.exists()


def test_invalid_utf8_is_refused_replaced_or_skipped(tmp_path, trained_tokenizers):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in (("a", b"x = 1"), ("b", b"y = \xff2"), ("c", b"z = 3")):
        (folder / f"{name}.py").write_bytes(content)
    file = trained_tokenizers / "tokenizer.json"
    text = message(request(folder, tmp_path / "e", file, glob="*"))
    assert f"{folder / 'b.py'}: invalid UTF-8 at byte 4" in text and "--invalid-utf8 replace or skip" in text
    for choice, counts, texts in (
        ("replace", (1, 0), ["x = 1", "y = \ufffd2", "z = 3"]),
        ("skip", (0, 1), ["x = 1", "z = 3"]),
    ):
        asked = request(folder, tmp_path / choice, file, invalid_utf8=choice, glob="*", unit_bytes=10**6)
        prepared = made(asked)
        assert prepared.first_invalid == str(folder / "b.py")
        assert [build_tokenizer(str(file)).decode(ids) for ids in documents_of(asked.prefix)] == texts
        assert (prepared.description.replaced_documents, prepared.description.skipped_documents) == counts
    made(request(folder, tmp_path / "bytes", glob="*"))
    assert texts_of(tmp_path / "bytes")[1] == b"y = \xff2"


def test_documents_that_are_left_out_are_reported_with_their_locations(tmp_path, trained_tokenizers):
    file, model = tmp_path / "a.jsonl", trained_tokenizers / "tokenizer.model"
    file.write_bytes(b"\n".join([b'{"text": "\xff"}', b'{"text": "four"}', b"", b'{"text": ""}']))
    prepared = made(request(file, tmp_path / "a", model, invalid_utf8="skip", unit_bytes=10**6))
    tokens = len(build_tokenizer(str(model)).encode("four")) + 1
    assert data_tables.describe(tmp_path / "a", prepared).splitlines() == [
        f"{tmp_path / 'a'}: 1 documents, {tokens} tokens, 0.0 MB of text, {4 / tokens:.2f} bytes per token",
        "1 files: 1 JSON lines",
        f"2 documents left out because they have no tokens, the first: {file}, line 3",
        f"1 documents left out for invalid UTF-8, the first: {file}, line 1",
    ]


def test_killed_worker_is_reported_with_its_document(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")  # reading blocks until it is opened for writing
    asked = request([write_jsonl(tmp_path / "a.jsonl", ["a"]), pipe], tmp_path / "a")

    def kill_the_worker():
        while not units_in(asked):
            time.sleep(0.01)
        reader_has_opened_it = os.open(pipe, os.O_WRONLY)
        for server in psutil.Process().children():
            for worker in server.children():
                worker.send_signal(signal.SIGKILL)
        os.close(reader_has_opened_it)

    killer = threading.Thread(target=kill_the_worker)
    killer.start()
    text = message(asked)
    killer.join()
    assert f"a worker process was killed by signal 9 while it read {pipe}" in text
    assert "the same command continues" in text and units_in(asked) == 1


@pytest.mark.parametrize("limit", [100, 12_000])
def test_full_disk_is_reported_and_costs_nothing_that_is_done(corpus, tmp_path, limit):
    """The largest size of a file stands in for the disk's: 100 bytes stop the plan, 12 kB the tokens."""
    asked = request(corpus, tmp_path / "a", glob="*.py")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        text = message(asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {asked.folder}" in text and "(File too large): fix that, then repeat the command" in text
    made(asked)
    assert texts_of(tmp_path / "a") == [text for file in sorted(corpus.iterdir()) if (text := file.read_bytes())]


DAMAGES = {
    "cut lengths": (LENGTHS, lambda content: content[:-1], 2),
    "no lengths": (LENGTHS, None, 0),
    "no tokens": (TOKENS, None, 0),
    "another token": (TOKENS, lambda content: b"?" + content[1:], 0),
    "cut journal": (JOURNAL, lambda content: content[:-20], 2),
    "another count": (JOURNAL, lambda content: content.replace(b'"documents": ', b'"documents": 1', 1), 0),
    "cut plan": (PLAN, lambda content: b"{", None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_units_are_made_again(corpus, tmp_path, damage):
    """As after a power failure: what was written last may be missing or empty."""
    made(request(corpus, tmp_path / "whole", glob="*.py"))
    asked = request(corpus, tmp_path / "a", glob="*.py")
    interrupt(asked)
    name, change, reused = DAMAGES[damage]
    file = asked.folder / name
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    if reused is None:
        assert "plan.json is corrupt: delete" in message(asked)
        return
    made(asked, recorder := Recorder())
    assert sum(recorder.reused) == reused
    assert digests(tmp_path / "a") == digests(tmp_path / "whole")


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_kill_between_the_final_names_does_not_cost_the_corpus(tmp_path, monkeypatch, renames):
    """With all three files renamed only the folder is left to remove."""
    made(request(write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "whole"))
    asked = request(tmp_path / "a.jsonl", tmp_path / "killed")
    rename, renamed = Path.rename, []

    def killed(self, target):
        if target.parent == tmp_path:
            renamed.append(target)
            if len(renamed) > renames:
                raise KeyboardInterrupt
        rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        patch.setattr("mtp_dist.data.prepare.prepare._remove", Mock(side_effect=KeyboardInterrupt))
        made(asked)
    made(asked, recorder := Recorder())
    assert recorder.reused == ([True] if renames < 3 else [])
    assert digests(asked.prefix) == digests(tmp_path / "whole") and not asked.folder.exists()


def test_fixed_input_does_not_need_a_new_folder(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    file.write_text(file.read_text() + "{")
    asked = request(file, tmp_path / "c")
    assert "line 3 is not valid JSON" in message(asked)
    write_jsonl(file, ["a", "b", "c"])
    made(asked)
    assert texts_of(tmp_path / "c") == [b"a", b"b", b"c"]


def test_input_that_vanishes_is_reported(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_dist.data.prepare.prepare._plan", lambda *_: shutil.rmtree(corpus))
    assert f"cannot read {corpus / '00.py'} (No such file" in message(request(corpus, tmp_path / "a", glob="*.py"))


def test_impossible_corpora_are_refused(tmp_path):
    file = tmp_path / "file"
    for target, kind, reason in (
        ("empty", DataError, "no document has any text"),
        ("file/a", DataError, f"cannot create {file}/a.unfinished (Not a directory)"),
        ("c.bin", ConfigError, f"use --to '{tmp_path}/c'"),
        ("c.idx", ConfigError, f"use --to '{tmp_path}/c'"),
        ("c.json", ConfigError, f"'{tmp_path}/c.json' ends with .json, a suffix"),
    ):
        file.write_text("" if target == "empty" else "text")
        assert reason in message(request(file, tmp_path / target), kind)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty.unfinished"}


VOCABULARY = ["<|endoftext|>", "known", *"know"]
WORDS = tokenizers.models.WordLevel({token: i for i, token in enumerate(VOCABULARY)})
UNIGRAMS = tokenizers.models.Unigram([(token, -1.0) for token in VOCABULARY])


@pytest.mark.parametrize("model", [WORDS, UNIGRAMS], ids=["words", "unigrams"])
def test_text_without_tokens_is_reported_with_its_location(tmp_path, model):
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    file = write_jsonl(tmp_path / "a.jsonl", ["known", "new"])
    text = message(request(file, tmp_path / "c", tmp_path / "tokenizer.json"))
    assert text.startswith(f"{file}, line 2: ") and "has no token for a part of this text" in text


def test_progress_lines_have_fraction_rates_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(data_tables, "monotonic", lambda: now[0])
    output = io.StringIO()
    with data_tables.PreparationProgress(Console(file=output)) as shown:
        shown.start(1000)
        shown.advance(500, UnitSummary(tokens=10**9, bytes=10**9), True)
        now[0] += 20
        shown.advance(100, UnitSummary(tokens=4_000_000, bytes=10_000_000), False)
        now[0] += 1
        shown.advance(100, UnitSummary(), False)
    lines = output.getvalue().splitlines()
    assert lines == ["60 % | 4,000,000 tokens | 200,000 tokens/s | 0.5 MB/s | 0:01:20 left"]
