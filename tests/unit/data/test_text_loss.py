"""What a tokenizer loses of the text is measured, reported and, above a limit, refused."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mtp_dist.config import Config, build_config
from mtp_dist.data.corpus import open_corpus
from mtp_dist.data.datasets import Datasets, load_datasets
from mtp_dist.data.prepare.inspection import inspect_corpus, print_report
from mtp_dist.data.prepare.progress import describe
from mtp_dist.data.tokenizer import build_tokenizer
from mtp_dist.errors import UserError
from tests.tiny import resolved
from tests.unit.data.preparing import made, request, units_in

ENGLISH = "the quick brown fox jumps over the lazy dog, and packs my box with five dozen jugs "
GERMAN = "für größere Übungen heißt es üben. "
CODE = "def fox(box):\n    for dog in box:\n\n        yield dog  # the lazy one\n"
JAPANESE = "日本語のテキストは消えてしまう。"


@pytest.fixture(scope="module", params=["bytes", "characters"])
def lossy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs trained without an initial alphabet: what is not in the English text has no token."""
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


def json_lines(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def config(tokenizer: Path, source: dict[str, Any], **keys: float) -> Config:
    return resolved(
        build_config(
            {
                "model": {"hidden_size": 8, "trunk_layers": 1, "num_attention_heads": 1},
                "heads": {"count": 2},
                "data": {"train": [source], "validation": [source], "tokenizer": str(tokenizer), **keys},
                "train": {"steps": 5, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 8},
            }
        )
    )


@pytest.mark.parametrize("text", [GERMAN, JAPANESE, ENGLISH * 3 + JAPANESE])
def test_prepare_refuses_a_tokenizer_that_loses_text(tmp_path: Path, lossy: Path, text: str) -> None:
    asked = request(json_lines(tmp_path / "a.jsonl", [ENGLISH, text]), tmp_path / "c", lossy)
    with pytest.raises(UserError, match=r"% of the text does not survive .*lossy.*, most of all '.*--max-text-loss"):
        made(asked)
    assert not (tmp_path / "c.bin").exists()
    prepared = made(replace(asked, max_text_loss=1.0))
    description = prepared.description
    assert description.checked_bytes == len((ENGLISH + text).encode())
    decoded = "".join(build_tokenizer(str(lossy)).decode(build_tokenizer(str(lossy)).encode(text)))
    assert 0 < description.lost_bytes <= len(text.encode())
    assert description.lost_bytes == pytest.approx(len(text.encode()) - len(decoded.replace("�", "").encode()), abs=9)
    assert "% of the text does not survive" in describe(tmp_path / "c", prepared)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_refuses_a_tokenizer_that_loses_text(tmp_path: Path, lossy: Path, stream: bool) -> None:
    source = {"path": str(json_lines(tmp_path / "a.jsonl", [ENGLISH + GERMAN] * 20)), "stream": stream}

    def load(**keys: float) -> Datasets:
        datasets = load_datasets(config(lossy, source, **keys))
        datasets.train.read(0, 1)
        return datasets

    with pytest.raises(UserError, match=r"^data\.(train|validation)\.0\..*% of the text does not survive") as error:
        load()
    assert "'ü'" in str(error.value) and "raise data.max_text_loss" in str(error.value)
    datasets = load(max_text_loss=0.5)
    assert any("% of the text does not survive" in line for line in datasets.notices)
    tokens = len(build_tokenizer(str(lossy)).encode(ENGLISH + GERMAN)) + 1
    lost = len("üößÜüß".encode()) + 3
    survived = len((ENGLISH + GERMAN).encode()) - lost
    (validation,) = datasets.validation
    assert validation.bytes_per_token == pytest.approx(survived / tokens, rel=0.02), "bytes that no token stands for"


def test_a_prepared_corpus_keeps_what_was_lost(tmp_path: Path, lossy: Path) -> None:
    texts = [ENGLISH + GERMAN, JAPANESE] * 10
    asked = request(json_lines(tmp_path / "a.jsonl", texts), tmp_path / "c", lossy)
    made(replace(asked, max_text_loss=1.0))
    with pytest.raises(UserError, match=r"^data\..*% of the text does not survive .*data\.max_text_loss"):
        load_datasets(config(lossy, {"path": str(tmp_path / "c")}))
    from_corpus = load_datasets(config(lossy, {"path": str(tmp_path / "c")}, max_text_loss=1.0))
    from_text = load_datasets(config(lossy, {"path": str(tmp_path / "a.jsonl")}, max_text_loss=1.0))
    assert np.array_equal(from_corpus.train.read(0, 8), from_text.train.read(0, 8))
    figures = [datasets.validation[0].bytes_per_token for datasets in (from_corpus, from_text)]
    assert figures[0] == pytest.approx(figures[1])

    corpus = open_corpus(tmp_path / "c", "DATA")
    report = inspect_corpus(corpus, build_tokenizer(str(lossy)), 2, 4, 1, 3, watch=lambda done: None)
    shown = io.StringIO()
    print_report(report, Console(file=shown, width=120))
    assert "% of the text does not survive" in shown.getvalue()


def test_what_survives_is_said_only_by_inspect(tmp_path: Path, trained_tokenizers: Path) -> None:
    for number, name in enumerate(("tokenizer.json", "tokenizer.model")):
        text = json_lines(tmp_path / "a.jsonl", [GERMAN, JAPANESE, "a\n\n  b\t", ""])
        prepared = made(request(text, tmp_path / f"{number}", trained_tokenizers / name))
        assert prepared.description.checked_bytes == prepared.description.bytes
        assert prepared.description.lost_bytes == 0
        assert "does not survive" not in describe(tmp_path / f"{number}", prepared)
    assert load_datasets(config(trained_tokenizers / name, {"path": str(tmp_path / "1")})).notices == ()


@pytest.fixture(scope="module")
def folding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with the trainer's own defaults: runs of whitespace become one space."""
    file = tmp_path_factory.mktemp("folding") / "tokenizer.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([CODE, ENGLISH]), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    file.write_bytes(model.getvalue())
    return file


def test_whitespace_that_a_tokenizer_folds_is_reported_and_not_limited(tmp_path: Path, folding: Path) -> None:
    texts = [CODE] * 20
    prepared = made(request(json_lines(tmp_path / "a.jsonl", texts), tmp_path / "c", folding))
    said = describe(tmp_path / "c", prepared)
    folded = len(" ".join(CODE.split()))
    assert prepared.description.lost_bytes == prepared.description.lost_whitespace == 20 * (len(CODE) - folded)
    assert f"; whitespace is lost in addition, {1 - folded / len(CODE):.2%} of the text" in said
    tokens = len(build_tokenizer(str(folding)).encode(CODE)) + 1
    for path in ("c", "a.jsonl"):
        datasets = load_datasets(config(folding, {"path": str(tmp_path / path)}, max_text_loss=0.0))
        assert any("whitespace is lost in addition" in line for line in datasets.notices)
        assert datasets.validation[0].bytes_per_token == pytest.approx(folded / tokens), "bytes that tokens stand for"
    shown = io.StringIO()
    corpus = open_corpus(tmp_path / "c", "DATA")
    report = inspect_corpus(corpus, build_tokenizer(str(folding)), 2, 4, 1, 3, watch=lambda done: None)
    print_report(report, Console(file=shown, width=120))
    assert "whitespace is lost in addition" in shown.getvalue()

    with pytest.raises(UserError, match=r"most of all '日', .*'; whitespace is lost in addition"):
        made(request(json_lines(tmp_path / "b.jsonl", [CODE + JAPANESE]), tmp_path / "d", folding))


def test_prepare_judges_the_loss_of_the_whole_corpus(tmp_path: Path, lossy: Path) -> None:
    """It ends early only if what is left cannot make up for what was lost."""
    texts = [GERMAN, *[ENGLISH] * 100]
    asked = request(json_lines(tmp_path / "a.jsonl", texts), tmp_path / "c", lossy, unit_bytes=len(GERMAN))
    prepared = made(asked)
    assert 0 < prepared.loss.lost_bytes < 0.01 * prepared.loss.checked_bytes

    for name, texts in (("early", [ENGLISH + JAPANESE] * 100), ("late", [ENGLISH] * 95 + [ENGLISH + JAPANESE] * 5)):
        asked = request(json_lines(tmp_path / f"{name}.jsonl", texts), tmp_path / name, lossy, unit_bytes=90)
        with pytest.raises(UserError, match=r"% of the text does not survive"):
            made(asked)
        assert (units_in(asked) < 50) == (name == "early")
        made(replace(asked, max_text_loss=1.0))


@given(st.text(max_size=30), st.text(max_size=30))
def test_lost_bytes_are_those_of_the_characters_that_are_missing(text: str, decoded: str) -> None:
    from mtp_dist.data.text_loss import lost_characters

    lost = lost_characters(text, decoded)
    assert not lost_characters(text, text) and not lost_characters(text, decoded + text)
    assert 0 <= lost.total() <= len(text) and lost.total() >= len(text) - len(decoded)
    assert set(lost) <= set(text)
