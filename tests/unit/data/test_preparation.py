"""The prepared corpus is the same bytes whatever happens on the way, and what goes wrong is said in one sentence."""

import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import datasets
import psutil
import pytest
import tokenizers

from mtp_dist.data.prepare.corpus_writer import JOURNAL, LENGTHS, TOKENS
from mtp_dist.data.prepare.prepare import PLAN, Request, prepare
from mtp_dist.data.prepare.tokenize import UnitSummary
from mtp_dist.data.tokenizer import build_tokenizer
from mtp_dist.errors import UserError
from tests.unit.data.preparing import Recorder, digests, documents_of, made, request, start, texts_of, units_in


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 60 files of 0.1 to 3 kB, every tenth one empty."""
    numbers = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(60):
        lines = numbers.randrange(5, 120) if index % 10 else 0
        text = "".join(f"x{numbers.randrange(1000)} = {numbers.randrange(1000)}  # é\n" for _ in range(lines))
        (folder / f"{index:02d}.py").write_text(text)
    return folder


def json_lines(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json", "tokenizer.model"])
def test_the_result_does_not_depend_on_the_number_of_workers(
    corpus: Path, tmp_path: Path, trained_tokenizers: Path, tokenizer: str
) -> None:
    name = tokenizer if tokenizer == "bytes" else str(trained_tokenizers / tokenizer)
    for workers in (1, 2):
        prepared = made(request(corpus, tmp_path / str(workers), name, workers=workers, glob="*.py"))
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert set(digests(tmp_path / "1")) == {".bin", ".idx", ".json"}

    texts = [file.read_bytes() for file in sorted(corpus.iterdir())]
    built = build_tokenizer(name)
    assert documents_of(tmp_path / "1") == [built.encode(text).tolist() for text in texts if text]
    description = prepared.description
    assert description.documents == 54 and description.bytes == sum(map(len, texts))
    assert description.tokenizer.sha256 == built.fingerprint
    assert description.empty_documents == 6 and prepared.first_empty == str(corpus / "00.py")


def test_the_size_of_the_work_units_does_not_show_either(corpus: Path, tmp_path: Path) -> None:
    for unit_bytes in (1, 10**6):
        made(request(corpus, tmp_path / str(unit_bytes), unit_bytes=unit_bytes, workers=2, glob="*.py"))
    assert digests(tmp_path / "1") == digests(tmp_path / "1000000")


def test_a_vocabulary_beyond_two_bytes_is_written_in_four(tmp_path: Path, trained_tokenizers: Path) -> None:
    content = json.loads((trained_tokenizers / "tokenizer.json").read_text())
    many = {"id": 70_000, "content": "<far>", "special": False, "single_word": False}
    many |= {"lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] += [many | {"id": 303 + i, "content": f"<{i}>"} for i in range(70_000 - 303)] + [many]
    (tmp_path / "large.json").write_text(json.dumps(content))
    made(request(json_lines(tmp_path / "a.jsonl", ["a<far>", "b"]), tmp_path / "a", tmp_path / "large.json"))
    assert documents_of(tmp_path / "a")[0][1] == 70_000


def killed_and_finished(asked: Request, kills: int, seconds: float) -> int:
    """Kill `prepare` at random moments, then let it finish. How many kills found it with units done."""
    moments = random.Random(1)
    in_the_middle = 0
    for _ in range(kills):
        before = units_in(asked)
        process = start(asked, pause=0.03)
        deadline = time.monotonic() + 60
        while process.is_alive() and units_in(asked) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.random() * seconds)
        process.kill()
        process.join()
        in_the_middle += units_in(asked) > 0
        names = set(digests(asked.prefix))
        assert ".json" not in names or names == {".bin", ".idx", ".json"}
    if asked.folder.exists():
        made(asked)
    return in_the_middle


def test_kills_at_random_moments_leave_no_trace(corpus: Path, tmp_path: Path) -> None:
    made(request(corpus, tmp_path / "whole", glob="*.py"))
    asked = request(corpus, tmp_path / "killed", workers=2, glob="*.py")
    assert killed_and_finished(asked, kills=3, seconds=0.05) >= 2
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_units_that_are_done_are_not_encoded_again_also_of_a_stream(tmp_path: Path) -> None:
    texts = [f"text {i} " * 30 for i in range(60)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "set")
    asked = request(tmp_path / "set", tmp_path / "a", streaming=True)

    class Interrupting(Recorder):
        def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
            super().advance(size, summary, reused)
            if len(self.reused) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(asked, Interrupting())
    assert not list(tmp_path.glob("a.[bij]*"))
    recorder = Recorder()
    prepare(asked, recorder)
    assert recorder.reused[:4] == [True] * 3 + [False] and len(recorder.reused) > 6
    assert texts_of(tmp_path / "a") == [text.encode() for text in texts]
    assert recorder.total is None


def message(asked: Request) -> str:
    """Nothing has the final name after a failure."""
    before = digests(asked.prefix)
    with pytest.raises(UserError) as error:
        made(asked)
    assert "\n" not in str(error.value)
    assert digests(asked.prefix) == before
    return str(error.value)


def test_an_unfinished_folder_of_something_else_is_not_gone_on_with(corpus: Path, tmp_path: Path) -> None:
    bad = json_lines(tmp_path / "a.jsonl", ["good"] * 300)
    bad.write_text(bad.read_text() + "bad\n")
    asked = request([corpus, bad], tmp_path / "a", glob="*.py")
    assert f"{bad}, line 301 is not JSON" in message(asked)
    begun = units_in(asked)
    assert begun

    other_pattern = message(request([corpus, bad], tmp_path / "a", glob="*1.py"))
    assert f"'{asked.folder}' was begun with other options (glob: '*.py', now '*1.py')" in other_pattern
    assert "delete that folder" in other_pattern
    assert "other inputs" in message(request([corpus], tmp_path / "a", glob="*.py"))
    assert "other invalid UTF-8" in message(request([corpus, bad], tmp_path / "a", glob="*.py", invalid_utf8="skip"))
    json_lines(bad, ["good"])
    assert f"other files and datasets ({bad} has changed)" in message(asked)
    assert units_in(asked) == begun
    shutil.rmtree(asked.folder)
    made(asked)


def test_a_corpus_that_is_there_is_not_touched(tmp_path: Path) -> None:
    asked = request(json_lines(tmp_path / "a.jsonl", ["a"]), tmp_path / "a.corpus")
    made(asked)
    assert f"{tmp_path / 'a.corpus.bin'} exists: delete it, or name another" in message(asked)
    assert not asked.folder.exists()


def test_a_kill_between_the_last_rename_and_the_cleaning_up_is_mended(tmp_path: Path) -> None:
    asked = request(json_lines(tmp_path / "a.jsonl", ["a"]), tmp_path / "a")
    whole = request(tmp_path / "a.jsonl", tmp_path / "whole")
    made(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtp_dist.data.prepare.prepare._remove", lambda folder: None)
        made(asked)
    made(asked)
    assert not asked.folder.exists()
    assert texts_of(tmp_path / "a") == [b"a"]


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    asked = request(json_lines(tmp_path / "a.jsonl", ["a"]), tmp_path / "a")

    class Nosy(Recorder):
        def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
            with pytest.raises(UserError, match="another process prepares"):
                made(asked)

    prepare(asked, Nosy())
    assert texts_of(tmp_path / "a") == [b"a"]


def test_invalid_utf8_is_refused_replaced_or_skipped(tmp_path: Path, trained_tokenizers: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in (("a", b"x = 1"), ("b", b"y = \xff2"), ("c", b"z = 3")):
        (folder / f"{name}.py").write_bytes(content)
    json_model = trained_tokenizers / "tokenizer.json"
    tokenizer = build_tokenizer(str(json_model))
    said = message(request(folder, tmp_path / "e", json_model, glob="*"))
    assert f"{folder / 'b.py'}: invalid UTF-8 at byte 4" in said and "--invalid-utf8 replace or skip" in said

    read = {}
    for choice in ("replace", "skip"):
        asked = request(folder, tmp_path / choice, json_model, invalid_utf8=choice, glob="*", unit_bytes=10**6)
        prepared = made(asked)
        assert prepared.first_invalid == str(folder / "b.py")
        read[choice] = [tokenizer.decode(ids) for ids in documents_of(asked.prefix)]
        counts = (prepared.description.replaced_documents, prepared.description.skipped_documents)
        assert counts == ((1, 0) if choice == "replace" else (0, 1))
    assert read == {"replace": ["x = 1", "y = \ufffd2", "z = 3"], "skip": ["x = 1", "z = 3"]}
    made(request(folder, tmp_path / "bytes", glob="*"))
    assert texts_of(tmp_path / "bytes")[1] == b"y = \xff2"


def test_places_are_right_behind_skipped_documents(tmp_path: Path, trained_tokenizers: Path) -> None:
    lines = [b'{"text": "\xff"}', b'{"text": "a"}', b"", b'{"text": "b"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    model = trained_tokenizers / "tokenizer.model"
    prepared = made(request(tmp_path / "a.jsonl", tmp_path / "a", model, invalid_utf8="skip", unit_bytes=10**6))
    assert prepared.first_invalid == f"{tmp_path / 'a.jsonl'}, line 1"
    assert prepared.first_empty == f"{tmp_path / 'a.jsonl'}, line 3"


def test_inputs_without_any_text_make_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "no document has any text" in message(request(tmp_path / "empty.txt", tmp_path / "a"))


def test_a_worker_that_dies_is_told_and_its_unit_read_again(corpus: Path, tmp_path: Path) -> None:
    (corpus / "00.py").unlink()
    os.mkfifo(corpus / "pipe")  # reading it takes until somebody writes
    (corpus / "00.py").symlink_to(corpus / "pipe")
    asked = request([json_lines(tmp_path / "a.jsonl", ["a"]), corpus / "00.py"], tmp_path / "a")

    def kill_the_worker() -> None:
        while not units_in(asked):
            time.sleep(0.01)
        reader_has_opened_it = os.open(corpus / "pipe", os.O_WRONLY)
        for server in psutil.Process().children():
            for worker in server.children():
                worker.send_signal(signal.SIGKILL)
        os.close(reader_has_opened_it)

    killer = threading.Thread(target=kill_the_worker)
    killer.start()
    said = message(asked)
    killer.join()
    assert f"a worker process was killed by signal 9 while it read {corpus / '00.py'}" in said
    assert "the same command goes on" in said
    assert units_in(asked) == 1


@pytest.mark.parametrize("limit", [100, 12_000])
def test_a_disk_that_fills_up_is_told_and_does_not_cost_what_is_done(corpus: Path, tmp_path: Path, limit: int) -> None:
    """The largest size of a file stands in for the disk's: 100 bytes stop the plan, 12 kB the tokens."""
    asked = request(corpus, tmp_path / "a", glob="*.py")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        said = message(asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"cannot write {asked.folder}" in said and "(File too large): fix that, then repeat the command" in said
    made(asked)
    assert texts_of(tmp_path / "a") == [text for file in sorted(corpus.iterdir()) if (text := file.read_bytes())]


@pytest.mark.parametrize(
    "damage", ["cut lengths", "no lengths", "no tokens", "a token", "cut journal", "a count", "plan"]
)
def test_what_was_damaged_is_made_again(corpus: Path, tmp_path: Path, damage: str) -> None:
    """As after a power failure: what was written last may be missing or empty."""
    made(request(corpus, tmp_path / "whole", glob="*.py"))
    asked = request(corpus, tmp_path / "a", glob="*.py")
    done = 3
    process = start(asked, units=done)
    while units_in(asked) < done:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    files = {name: asked.folder / name for name in (TOKENS, LENGTHS, JOURNAL, PLAN)}
    expected = 0
    if damage.startswith("no "):
        files[f"{damage[3:]}.bin"].unlink()
    if damage == "cut lengths":
        expected = done - 1
        files[LENGTHS].write_bytes(files[LENGTHS].read_bytes()[:-1])
    if damage == "a token":
        files[TOKENS].write_bytes(b"?" + files[TOKENS].read_bytes()[1:])
    if damage == "cut journal":
        expected = done - 1
        files[JOURNAL].write_bytes(files[JOURNAL].read_bytes()[:-20])
    if damage == "a count":
        files[JOURNAL].write_text(files[JOURNAL].read_text().replace('"documents": ', '"documents": 1', 1))
    if damage == "plan":
        files[PLAN].write_text("{")
        assert "plan.json is damaged: delete" in message(asked)
        return
    recorder = Recorder()
    prepare(asked, recorder)
    assert sum(recorder.reused) == expected
    assert digests(tmp_path / "a")[".bin"] == digests(tmp_path / "whole")[".bin"]
    assert digests(tmp_path / "a")[".idx"] == digests(tmp_path / "whole")[".idx"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_the_names_of_a_whole_corpus_does_not_cost_it(tmp_path: Path, renames: int) -> None:
    made(request(json_lines(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "whole"))
    asked = request(tmp_path / "a.jsonl", tmp_path / "a")
    rename, left = Path.rename, renames

    def killed(self: Path, target: Path) -> None:
        nonlocal left
        if target.parent == tmp_path:
            if not left:
                raise KeyboardInterrupt
            left -= 1
        rename(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        made(asked)
    recorder = Recorder()
    prepare(asked, recorder)
    assert recorder.reused == [True]
    assert digests(tmp_path / "a")[".bin"] == digests(tmp_path / "whole")[".bin"]
    assert digests(tmp_path / "a")[".idx"] == digests(tmp_path / "whole")[".idx"]


def test_a_mistake_that_is_mended_does_not_need_a_new_folder(tmp_path: Path) -> None:
    text = json_lines(tmp_path / "a.jsonl", ["a", "b"])
    text.write_text(text.read_text() + "{")
    asked = request(text, tmp_path / "c")
    assert "line 3 is not JSON" in message(asked)
    json_lines(text, ["a", "b", "c"])
    made(asked)
    assert texts_of(tmp_path / "c") == [b"a", b"b", b"c"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = json_lines(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match=r"cannot make .*file/a\.unfinished \(Not a directory\)"):
        made(request(text, tmp_path / "file" / "a"))


def test_an_input_that_vanishes_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtp_dist.data.prepare.prepare._plan", lambda *_: shutil.rmtree(corpus))
    assert f"cannot read {corpus / '00.py'} (No such file" in message(request(corpus, tmp_path / "a", glob="*.py"))


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_the_name_of_one_file_of_a_corpus_is_refused(tmp_path: Path, suffix: str) -> None:
    text = json_lines(tmp_path / "a.jsonl", ["a"])
    said = message(request(text, tmp_path / f"c{suffix}"))
    assert f"'{tmp_path / 'c'}{suffix}' ends with {suffix}" in said and said.endswith(f"give --to '{tmp_path / 'c'}'")
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_a_text_that_a_tokenizer_has_no_tokens_for_is_named(tmp_path: Path, kind: str) -> None:
    vocabulary = ["<|endoftext|>", "known", *"know"]
    models = {
        "WordLevel": lambda: tokenizers.models.WordLevel({token: i for i, token in enumerate(vocabulary)}),
        "Unigram": lambda: tokenizers.models.Unigram([(token, -1.0) for token in vocabulary]),
    }
    tokenizers.Tokenizer(models[kind]()).save(str(tmp_path / "tokenizer.json"))
    text = json_lines(tmp_path / "a.jsonl", ["known", "new"])
    said = message(request(text, tmp_path / "c", tmp_path / "tokenizer.json"))
    assert said.startswith(f"{text}, line 2: ") and "has no token for a part of this text" in said
