"""Shared by the tests of data. Worker processes import it by name."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from mtp_dist.config import Config
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.corpus import open_corpus
from mtp_dist.data.prepare.prepare import Prepared, Request, prepare
from mtp_dist.data.prepare.tokenize import UnitSummary
from mtp_dist.data.sources.input import InputOptions
from mtp_dist.errors import UserError
from tests.tiny import tiny_config


def error_of(kind: type[UserError], function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return the one-line message of the error that a call raises."""
    with pytest.raises(kind) as raised:
        function(*args, **options)
    assert raised.type is kind and "\n" not in str(raised.value)
    return str(raised.value)


def write_jsonl(file: Path, texts: Sequence[str], field: str = "text") -> Path:
    file.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return file


def train_sentencepiece(file: Path, lines: Sequence[str], **options: Any) -> Path:
    """Train a model of byte pairs by default."""
    model = io.BytesIO()
    settings = {"model_type": "bpe", "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    file.write_bytes(model.getvalue())
    return file


def data_config(train: Any, validation: Any = (), data: Any = (), heads: int = 2, **train_keys: Any) -> Config:
    """Samples of 8 + heads tokens by default. `train` and `validation`: a path, a source or several sources."""

    def sources(given: Any) -> list[dict[str, Any]]:
        given = [given] if isinstance(given, str | Path | dict) else given
        return [{"path": str(item)} if isinstance(item, str | Path) else item for item in given]

    data = dict(data)
    return tiny_config(
        model={"vocab_size": build_tokenizer(data.get("tokenizer", "bytes")).vocab_size},
        data={"train": sources(train), "validation": sources(validation), **data},
        train={"steps": 5, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 8, **train_keys},
        heads={"count": heads},
    )


class Recorder:
    """A progress that keeps what it receives, for tests that act on it or kill the process at a known moment."""

    def __init__(self, act: Callable[[], Any] = lambda: None) -> None:
        """act: called after each unit."""
        self.act = act
        self.total: int | None = -1
        self.reused: list[bool] = []
        """Of each work unit."""

    def start(self, total: int | None) -> None:
        self.total = total

    def advance(self, size: int, summary: UnitSummary, reused: bool) -> None:
        self.reused.append(reused)
        self.act()


def request(
    inputs: Any, prefix: Path, tokenizer: Path | str = "bytes", workers: int = 1, unit_bytes: int = 2000, **options: Any
) -> Request:
    """inputs: one or several. options: `invalid_utf8`, and those of the inputs."""
    names = [inputs] if isinstance(inputs, Path | str) else inputs
    keys = {"invalid_utf8": options.pop("invalid_utf8", "error"), "workers": workers, "unit_bytes": unit_bytes}
    return Request(tuple(map(str, names)), prefix, str(tokenizer), InputOptions(**options), **keys)


def made(asked: Request, progress: Recorder | None = None) -> Prepared:
    return prepare(asked, progress or Recorder())


def documents_of(prefix: Path) -> list[list[int]]:
    """Return the tokens of each document without its end."""
    corpus = open_corpus(prefix, "test")
    parts = np.split(corpus.tokens, np.cumsum(corpus.document_lengths))
    return [part[:-1].tolist() for part in parts[:-1]]


def texts_of(prefix: Path) -> list[bytes]:
    """Return the documents of a corpus of bytes."""
    return [bytes(document) for document in documents_of(prefix)]


def digests(prefix: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that starts with the prefix, by the rest of its name."""
    files = [file for file in sorted(prefix.parent.glob(prefix.name + ".*")) if file.is_file()]
    return {file.name[len(prefix.name) :]: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
