import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_dist.data import text_tokenizers
from mtp_dist.data.tokenizer import Tokenizer, build_tokenizer, dtype_of_ids
from mtp_dist.errors import UserError

SPACE_OF_SENTENCEPIECE = "\u2581"  # comes back as a space


@given(st.text())
def test_text_survives_a_round_trip(text: str) -> None:
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text


@given(st.binary())
def test_any_bytes_become_one_token_each(data: bytes) -> None:
    assert build_tokenizer("bytes").encode(data).tolist() == list(data)


def test_decoding_skips_special_tokens_and_replaces_invalid_bytes() -> None:
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.decode([256, 104, 105, 256, 0xFF, 300]) == "hi\ufffd"
    assert tokenizer.decode([]) == ""


def test_every_id_fits_the_vocabulary() -> None:
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.encode(bytes(range(256))).max() < tokenizer.end_of_document < tokenizer.vocab_size


def test_unknown_tokenizer_names_the_key_and_what_can_be_given() -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer = 'gpt9' is not known: .* `hf download gpt9` first"):
        build_tokenizer("gpt9")
    with pytest.raises(UserError, match=r"--tokenizer = '/no/such/tokenizer\.json' is not known"):
        build_tokenizer("/no/such/tokenizer.json", "--tokenizer")


@pytest.mark.parametrize("name", ["/no/such/folder", "./mine", "tokenizers/mine.json", "a/b/c", "~/mine", "mine.model"])
def test_a_missing_path_is_not_offered_for_download(name: str) -> None:
    with pytest.raises(UserError) as error:
        build_tokenizer(name)
    assert f"data.tokenizer = '{name}' is not known: " in str(error.value)
    assert "hf download" not in str(error.value)


def test_files_are_read_as_utf8_in_every_locale(trained_tokenizers: Path, tmp_path: Path) -> None:
    shutil.copy(trained_tokenizers / "tokenizer.json", tmp_path)
    settings = {"eos_token": "<stop>", "comment": "für alle"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    program = "import sys; from mtp_dist.data.tokenizer import build_tokenizer; build_tokenizer(sys.argv[1])"
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def text_tokenizer(request: pytest.FixtureRequest, trained_tokenizers: Path) -> Tokenizer:
    return build_tokenizer(str(trained_tokenizers / request.param))


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters=SPACE_OF_SENTENCEPIECE)), min_size=1, max_size=4)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_survives_a_round_trip_through_trained_tokenizers(text_tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = text_tokenizer.encode_batch([text.encode() for text in texts])
    assert [ids.tolist() for ids in encoded] == [text_tokenizer.encode(text).tolist() for text in texts]
    for ids, text in zip(encoded, texts, strict=True):
        assert (ids.dtype == np.uint16 and not len(ids)) or ids.max() < text_tokenizer.vocab_size
        assert text_tokenizer.decode(ids) == text


def test_nothing_is_added_to_the_text_and_nothing_in_it_ends_it(text_tokenizer: Tokenizer) -> None:
    """The file asks for a special token around each text, for padding and truncation, and the text spells it out."""
    text = "x = 1\n</s><|endoftext|>" * 50
    ids = text_tokenizer.encode(text)
    assert text_tokenizer.end_of_document not in ids
    assert text_tokenizer.decode([text_tokenizer.end_of_document, *ids]) == text
    copy = pickle.loads(pickle.dumps(text_tokenizer))
    assert copy.encode(text).tolist() == ids.tolist() and copy.fingerprint == text_tokenizer.fingerprint


def test_documents_become_one_stream_with_an_end_after_each(text_tokenizer: Tokenizer) -> None:
    texts, end = [b"a = 1", b"", b"b = 2"], text_tokenizer.end_of_document
    tokens, lengths = text_tokenizer.encode_documents(texts)
    first, last = (text_tokenizer.encode(text).tolist() for text in (texts[0], texts[2]))
    assert tokens.tolist() == [*first, end, *last, end]
    assert lengths == [len(first) + 1, 0, len(last) + 1]


def test_invalid_utf8_is_refused_with_its_offset(text_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"invalid UTF-8 at byte 3$"):
        text_tokenizer.encode(b"abc\xff")
    with pytest.raises(UserError, match=r"invalid UTF-8 at byte 0 of document 1$"):
        text_tokenizer.encode_batch([b"a", b"\x80"])


def test_a_folder_stands_for_its_tokenizer_and_says_how_texts_end(trained_tokenizers: Path, tmp_path: Path) -> None:
    shutil.copy(trained_tokenizers / "tokenizer.json", tmp_path)
    plain = build_tokenizer(str(tmp_path))
    assert plain.vocab_size == 303 and plain.end_of_document == 300  # <|endoftext|>: the first of the usual names
    config = tmp_path / "tokenizer_config.json"
    for eos in ("<stop>", {"content": "<stop>", "special": True}):
        config.write_text(json.dumps({"eos_token": eos}))
        configured = build_tokenizer(str(tmp_path))
        assert configured.end_of_document == 302
    assert configured.fingerprint != plain.fingerprint
    config.write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not a JSON object"):
        build_tokenizer(str(tmp_path))


def test_the_fingerprint_is_that_of_the_ids_not_of_the_file(trained_tokenizers: Path, tmp_path: Path) -> None:
    content = json.loads((trained_tokenizers / "tokenizer.json").read_text())
    original = build_tokenizer(str(trained_tokenizers / "tokenizer.json"))
    same = content | {"truncation": None, "post_processor": None}
    other = content | {"model": content["model"] | {"merges": content["model"]["merges"][:-1]}}
    fingerprints = []
    for number, version in enumerate((same, other)):
        (tmp_path / f"{number}.json").write_text(json.dumps(version, indent=3))
        fingerprints.append(build_tokenizer(str(tmp_path / f"{number}.json")).fingerprint)
    assert fingerprints[0] == original.fingerprint != fingerprints[1]


def test_tokenizers_that_cannot_be_used_say_why(trained_tokenizers: Path, tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as error:
            build_tokenizer(str(path))
        assert str(error.value).startswith(f"data.tokenizer = '{path}'")
        return str(error.value)

    assert "is a folder without tokenizer.json or tokenizer.model" in message(tmp_path)
    for name in ("broken.json", "broken.model"):
        (tmp_path / name).write_text("{}")
        assert "is no tokenizer that can be read" in message(tmp_path / name)
    (tmp_path / "vocab.txt").touch()
    assert "neither a tokenizer.json nor a SentencePiece .model" in message(tmp_path / "vocab.txt")
    content = json.loads((trained_tokenizers / "tokenizer.json").read_text())
    (tmp_path / "endless.json").write_text(json.dumps(content | {"added_tokens": [], "post_processor": None}))
    assert "has no end-of-text token: add an eos_token to" in message(tmp_path / "endless.json")
    assert "has no end-of-text token: train it with --eos_id" in message(trained_tokenizers / "endless.model")


def test_a_name_is_looked_up_in_the_hugging_face_cache(
    trained_tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copy(trained_tokenizers / "tokenizer.json", snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0123")
    cached = functools.partial(text_tokenizers.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(text_tokenizers, "snapshot_download", cached)
    tokenizer = build_tokenizer("some/model")
    assert tokenizer.name == "some/model"
    assert tokenizer.fingerprint == build_tokenizer(str(trained_tokenizers / "tokenizer.json")).fingerprint


def test_ids_take_two_bytes_as_long_as_they_fit() -> None:
    assert [dtype_of_ids(size) for size in (257, 65499, 65500, 200_000)] == [np.uint16, np.uint16, np.int32, np.int32]
