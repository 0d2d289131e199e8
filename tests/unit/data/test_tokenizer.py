import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.data import text_tokenizers
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.errors import ConfigError, DataError
from tests.unit.data.preparing import error_of

SENTENCEPIECE_SPACE = "\u2581"  # decoded as a space


@given(st.text() | st.binary())
def test_byte_tokenizer_maps_each_byte_to_a_token(text):
    tokenizer = build_tokenizer("bytes")
    ids, data = tokenizer.encode(text), text.encode() if isinstance(text, str) else text
    assert ids.dtype == np.uint16 and ids.tolist() == list(data)
    assert tokenizer.decode(ids) == data.decode(errors="replace")


def test_decoding_skips_special_tokens_and_replaces_invalid_bytes():
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.decode([256, 104, 105, 256, 0xFF, 300]) == "hi\ufffd"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode(bytes(range(256))).max() < tokenizer.end_of_document < tokenizer.vocab_size


@pytest.mark.parametrize("name", "gpt9 /no/such/folder ./mine tokenizers/mine.json a/b/c ~/mine mine.model".split())
def test_only_hub_names_are_suggested_for_download(name):
    message = error_of(ConfigError, build_tokenizer, name, "--tokenizer")
    assert message.startswith(f"--tokenizer = '{name}' is unknown: ")
    assert message.endswith("`hf download gpt9` first") == ("hf download" in message) == (name == "gpt9")


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def text_tokenizer(request, trained_tokenizers):
    return build_tokenizer(str(trained_tokenizers / request.param))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters=SENTENCEPIECE_SPACE)), min_size=1, max_size=4))
def test_text_survives_trained_tokenizers(text_tokenizer, texts):
    encoded = text_tokenizer.encode_batch([text.encode() for text in texts])
    assert [ids.tolist() for ids in encoded] == [text_tokenizer.encode(text).tolist() for text in texts]
    for ids, text in zip(encoded, texts, strict=True):
        assert (ids.dtype == np.uint16 and not len(ids)) or ids.max() < text_tokenizer.vocab_size
        assert text_tokenizer.decode(ids) == text


def test_no_special_token_is_added_or_recognized(text_tokenizer):
    """The file asks for a special token around each text, for padding and truncation; the text spells tokens out."""
    text = "x = 1\n</s><|endoftext|>" * 50
    ids = text_tokenizer.encode(text)
    assert text_tokenizer.end_of_document not in ids
    assert text_tokenizer.decode([text_tokenizer.end_of_document, *ids]) == text
    copy = pickle.loads(pickle.dumps(text_tokenizer))
    assert copy.encode(text).tolist() == ids.tolist() and copy.fingerprint == text_tokenizer.fingerprint


def test_each_document_gets_an_end(text_tokenizer):
    texts, end = [b"a = 1", b"", b"b = 2"], text_tokenizer.end_of_document
    tokens, lengths = text_tokenizer.encode_documents(texts)
    first, last = (text_tokenizer.encode(text).tolist() for text in (texts[0], texts[2]))
    assert tokens.tolist() == [*first, end, *last, end]
    assert lengths == [len(first) + 1, 0, len(last) + 1]


def test_invalid_utf8_is_reported_with_its_offset(text_tokenizer):
    assert error_of(DataError, text_tokenizer.encode, b"abc\xff") == "invalid UTF-8 at byte 3"
    message = error_of(DataError, text_tokenizer.encode_batch, [b"a", b"\x80"])
    assert message == "invalid UTF-8 at byte 0 of document 1"


def test_fingerprint_depends_on_the_ids_only(trained_tokenizers, tmp_path):
    content = json.loads((trained_tokenizers / "tokenizer.json").read_text())
    shorter = content["model"] | {"merges": content["model"]["merges"][:-1]}
    versions = (content, content | {"truncation": None, "post_processor": None}, content | {"model": shorter})
    fingerprints = []
    for number, version in enumerate(versions):
        (tmp_path / f"{number}.json").write_text(json.dumps(version, indent=number))
        fingerprints.append(build_tokenizer(str(tmp_path / f"{number}.json")).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, 300),  # <|endoftext|>: the first of the common names
        ('{"eos_token": "<stop>"}', 302),
        ('{"eos_token": {"content": "<stop>", "special": true}, "comment": "für alle"}', 302),
        ("[]", "tokenizer_config.json is not a JSON object"),
        ('{"eos_token": "<other>"}', "has no token '<other>', which the files next to it name as eos_token"),
        ('{"eos_token": 3}', "names an eos_token that is not text"),
    ],
)
def test_files_next_to_a_tokenizer_name_its_end(trained_tokenizers, tmp_path, settings, expected):
    shutil.copy(trained_tokenizers / "tokenizer.json", tmp_path)
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    if isinstance(expected, str):
        assert expected in error_of(DataError, build_tokenizer, str(tmp_path))
        return
    built = build_tokenizer(str(tmp_path))
    assert built.vocab_size == 303 and built.end_of_document == expected
    plain = build_tokenizer(str(trained_tokenizers / "tokenizer.json"))
    assert (built.fingerprint == plain.fingerprint) == (expected == 300)
    if settings and not settings.isascii():  # read as UTF-8 in every locale
        program = "import sys; from mtp_dist.data.build_tokenizer import build_tokenizer; build_tokenizer(sys.argv[1])"
        ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | ascii_only, check=True)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("", ConfigError, "is a folder without tokenizer.json or tokenizer.model"),
        ("broken.json", DataError, "is not a valid tokenizer"),
        ("broken.model", DataError, "is not a valid tokenizer"),
        ("vocab.txt", ConfigError, "neither a tokenizer.json nor a SentencePiece .model"),
        ("endless.json", DataError, "has no end-of-text token: add an eos_token to"),
        ("endless.model", DataError, "has no end-of-text token: train it with --eos_id"),
    ],
)
def test_unusable_tokenizers_are_reported(trained_tokenizers, tmp_path, name, kind, reason):
    if name:
        (tmp_path / name).write_text("{}")
    if name == "endless.json":
        content = json.loads((trained_tokenizers / "tokenizer.json").read_text())
        (tmp_path / name).write_text(json.dumps(content | {"added_tokens": [], "post_processor": None}))
    if name == "endless.model":
        shutil.copy(trained_tokenizers / name, tmp_path)
    message = error_of(kind, build_tokenizer, str(tmp_path / name))
    assert message.startswith(f"data.tokenizer = '{tmp_path / name}'") and reason in message


def test_hub_names_are_read_from_the_cache(trained_tokenizers, tmp_path, monkeypatch):
    model, file = tmp_path / "models--some--model", trained_tokenizers / "tokenizer.json"
    for folder in (model / "snapshots" / "0123", model / "refs"):
        folder.mkdir(parents=True)
    shutil.copy(file, model / "snapshots" / "0123")
    (model / "refs" / "main").write_text("0123")
    download = text_tokenizers.snapshot_download
    monkeypatch.setattr(text_tokenizers, "snapshot_download", partial(download, cache_dir=tmp_path))
    tokenizer = build_tokenizer("some/model")
    assert (tokenizer.name, tokenizer.fingerprint) == ("some/model", build_tokenizer(str(file)).fingerprint)
