"""Text that a tokenizer loses is measured, reported and, above a limit, refused."""

import io
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mtp_dist.cli.data_tables import corpus_tables, describe
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.corpus import open_corpus
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.prepare.inspection import inspect_corpus
from mtp_dist.data.text_loss import lost_characters
from mtp_dist.errors import DataError
from tests.unit.data.preparing import Recorder, data_config, error_of, made, request, train_sentencepiece, write_jsonl

ENGLISH = "the quick brown fox jumps over the lazy dog, and packs my box with five dozen jugs "
GERMAN = "für größere Übungen heißt es üben. "
CODE = "def fox(box):\n    for dog in box:\n\n        yield dog  # the lazy one\n"
JAPANESE = "日本語のテキストは消えてしまう。"
LOST = "% of the text does not survive"


@pytest.fixture(scope="module", params=["bytes", "characters"])
def lossy(request, tmp_path_factory):
    """Pairs trained without an initial alphabet: characters that the English text lacks have no token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.Fuse()
    if request.param == "bytes":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator([ENGLISH], trainer)
    file = tmp_path_factory.mktemp("lossy") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def config(tokenizer, source, **keys):
    return data_config(source, source, data={"tokenizer": str(tokenizer), **keys})


def inspected(prefix, tokenizer):
    report = inspect_corpus(open_corpus(prefix, "DATA"), build_tokenizer(str(tokenizer)), 2, 4, 1, 3, on_progress=print)
    console = Console(file=io.StringIO(), width=120)
    console.print(*corpus_tables(report), soft_wrap=True)
    return console.file.getvalue()


@pytest.mark.parametrize("text", [GERMAN, JAPANESE, ENGLISH * 3 + JAPANESE])
def test_prepare_refuses_a_tokenizer_that_loses_text(tmp_path, lossy, text):
    asked = request(write_jsonl(tmp_path / "a.jsonl", [ENGLISH, text]), tmp_path / "c", lossy)
    message = error_of(DataError, made, asked)
    assert LOST in message and "most of all '" in message and "--max-text-loss" in message
    assert not (tmp_path / "c.bin").exists()
    prepared = made(replace(asked, max_text_loss=1.0))
    assert prepared.description.checked_bytes == len((ENGLISH + text).encode())
    tokenizer = build_tokenizer(str(lossy))
    survived = len(tokenizer.decode(tokenizer.encode(text)).replace("�", "").encode())
    assert 0 < prepared.description.lost_bytes <= len(text.encode())
    assert prepared.description.lost_bytes == pytest.approx(len(text.encode()) - survived, abs=9)
    assert LOST in describe(tmp_path / "c", prepared)


@pytest.mark.parametrize("stream", [False, True])
def test_run_refuses_a_tokenizer_that_loses_text(tmp_path, lossy, stream):
    source = {"path": str(write_jsonl(tmp_path / "a.jsonl", [ENGLISH + GERMAN] * 20)), "stream": stream}
    message = error_of(DataError, load_datasets, config(lossy, source))
    assert message.startswith("data.") and LOST in message and "'ü'" in message
    assert "raise data.max_text_loss" in message
    datasets = load_datasets(config(lossy, source, max_text_loss=0.5))
    assert any(LOST in line for line in datasets.descriptions)
    tokens = len(build_tokenizer(str(lossy)).encode(ENGLISH + GERMAN)) + 1
    survived = len((ENGLISH + GERMAN).encode()) - len("üößÜüß".encode()) - 3
    bytes_per_token = datasets.validation[0].bytes_per_token
    assert bytes_per_token == pytest.approx(survived / tokens, rel=0.02), "only bytes that tokens represent"


def test_prepared_corpus_stores_the_loss(tmp_path, lossy):
    asked = request(write_jsonl(tmp_path / "a.jsonl", [ENGLISH + GERMAN, JAPANESE] * 10), tmp_path / "c", lossy)
    made(replace(asked, max_text_loss=1.0))
    message = error_of(DataError, load_datasets, config(lossy, tmp_path / "c"))
    assert message.startswith("data.") and LOST in message and "data.max_text_loss" in message
    datasets = [load_datasets(config(lossy, tmp_path / name, max_text_loss=1.0)) for name in ("c", "a.jsonl")]
    assert np.array_equal(*(each.train.read(0, 8) for each in datasets))
    rates = [each.validation[0].bytes_per_token for each in datasets]
    assert rates[0] == pytest.approx(rates[1])
    assert LOST in inspected(tmp_path / "c", lossy)


def test_only_inspect_reports_that_nothing_is_lost(tmp_path, trained_tokenizers):
    text = write_jsonl(tmp_path / "a.jsonl", [GERMAN, JAPANESE, "a\n\n  b\t", ""])
    for name in ("json", "model"):
        tokenizer = trained_tokenizers / f"tokenizer.{name}"
        prepared = made(request(text, tmp_path / name, tokenizer))
        assert prepared.description.checked_bytes == prepared.description.bytes
        assert prepared.description.lost_bytes == 0
        assert "does not survive" not in describe(tmp_path / name, prepared)
        assert load_datasets(config(tokenizer, tmp_path / name)).descriptions == ()
        assert "bytes checked survive" in inspected(tmp_path / name, tokenizer)


def test_folded_whitespace_is_reported_but_not_limited(tmp_path):
    """With a SentencePiece model of the trainer's defaults: runs of whitespace become one space."""
    folding = train_sentencepiece(tmp_path / "tokenizer.model", [CODE, ENGLISH], vocab_size=60)
    prepared = made(request(write_jsonl(tmp_path / "a.jsonl", [CODE] * 20), tmp_path / "c", folding))
    folded = len(" ".join(CODE.split()))
    assert prepared.description.lost_bytes == prepared.description.lost_whitespace == 20 * (len(CODE) - folded)
    line = f"; whitespace is lost in addition, {1 - folded / len(CODE):.2%} of the text"
    assert line in describe(tmp_path / "c", prepared) and line[:30] in inspected(tmp_path / "c", folding)
    tokens = len(build_tokenizer(str(folding)).encode(CODE)) + 1
    for name in ("c", "a.jsonl"):
        datasets = load_datasets(config(folding, tmp_path / name, max_text_loss=0.0))
        assert any(line in description for description in datasets.descriptions)
        assert datasets.validation[0].bytes_per_token == pytest.approx(folded / tokens), "bytes that tokens represent"
    asked = request(write_jsonl(tmp_path / "b.jsonl", [CODE + JAPANESE]), tmp_path / "d", folding)
    message = error_of(DataError, made, asked)
    assert "most of all '日', " in message and "'; whitespace is lost in addition" in message


def test_prepare_judges_the_loss_of_the_whole_corpus(tmp_path, lossy):
    """It ends early only if the rest cannot make up for what was lost."""
    texts = write_jsonl(tmp_path / "a.jsonl", [GERMAN, *[ENGLISH] * 100])
    prepared = made(request(texts, tmp_path / "c", lossy, unit_bytes=len(GERMAN)))
    assert 0 < prepared.text_loss.lost_bytes < 0.01 * prepared.text_loss.checked_bytes
    for name, texts in (("early", [ENGLISH + JAPANESE] * 100), ("late", [ENGLISH] * 95 + [ENGLISH + JAPANESE] * 5)):
        asked = request(write_jsonl(tmp_path / f"{name}.jsonl", texts), tmp_path / name, lossy, unit_bytes=90)
        assert LOST in error_of(DataError, made, asked, recorder := Recorder())
        assert (len(recorder.reused) < 50) == (name == "early")
        made(replace(asked, max_text_loss=1.0))


@given(st.text(max_size=30), st.text(max_size=30))
def test_lost_characters_are_those_that_are_missing(text, decoded):
    lost = lost_characters(text, decoded)
    assert not lost_characters(text, text) and not lost_characters(text, decoded + text)
    assert 0 <= lost.total() <= len(text) and lost.total() >= len(text) - len(decoded)
    assert set(lost) <= set(text)
