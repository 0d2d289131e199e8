"""The text that `--data` names: a file, Python's standard library, or held-out documents of a synthetic task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_dist.analysis.marked_text import Mark, MarkedText
from mtp_dist.config.schema import SourceConfig
from mtp_dist.config.synthetic import SYNTHETIC_PREFIX, SyntheticConfig
from mtp_dist.data.sources.fields import Fields
from mtp_dist.data.sources.files_input import FilesInput
from mtp_dist.data.sources.python_stdlib import PYTHON_STDLIB, stdlib_files
from mtp_dist.data.synthetic.choices import Choices
from mtp_dist.data.synthetic.task import Document, TaskCorpus
from mtp_dist.data.synthetic.tasks import build_task, task_kind
from mtp_dist.data.tokenizer import Tokenizer, encode_documents
from mtp_dist.errors import CheckpointError, DataError

MARKS = {"choice": Mark.CHOICE, "determined": Mark.DETERMINED, "free": Mark.INCONSEQUENTIAL}
"""Marks of the words of `synthetic/choices`, by the group of their answers."""


class TextReader(Protocol):
    """A model that reads the text."""

    @property
    def folder(self) -> Path: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def sources(self) -> Sequence[SourceConfig]:
        """Sources of its training samples, if known."""


def read_tokens(data: str, model: TextReader, count: int) -> NDArray[np.integer]:
    """Return at least `count` tokens, or all of a shorter text, with the ends of documents.

    Raise UserError if the text cannot be read or encoded.
    """

    def location(_: int) -> str:
        return f"--data = '{data}'"

    parts: list[NDArray[np.integer]] = []
    total = 0
    for document in _documents(data, model):
        tokens, _ = encode_documents(model.tokenizer, [document], location)
        parts.append(tokens)
        total += len(tokens)
        if total >= count:
            break
    if not total:
        raise DataError(f"--data = '{data}' has no text: give another file")
    return np.concatenate(parts)


def read_marked_text(data: str, model: TextReader, count: int) -> MarkedText:
    """Return about `count` tokens of held-out documents with marked choice points.

    Raise DataError for another text, CheckpointError if the model's tokenizer splits words.
    """
    if data.removeprefix(SYNTHETIC_PREFIX) != Choices.name:
        raise DataError(f"--data = '{data}' has no marked choice points: use '{SYNTHETIC_PREFIX}{Choices.name}'")
    corpus = _task_corpus(data, model)
    tokens, marks = list[int](), list[Mark]()
    for document in _task_documents(corpus):
        encoded = model.tokenizer.encode(document.text).tolist()
        if len(encoded) != len(document.words):
            raise CheckpointError(
                f"--model = '{model.folder}' has a tokenizer that splits the words of '{data}', whose choice points "
                f"are marked by word: give a model that was trained with data.tokenizer = '{data}'"
            )
        groups = {answer.start: answer.group for answer in document.answers}
        tokens += [*encoded, model.tokenizer.end_of_document]
        marks += [*(MARKS[groups[index]] for index in range(len(document.words))), Mark.OTHER]
        if len(tokens) >= count:
            break
    return MarkedText(np.array(tokens), np.array(marks, dtype=np.uint8))


def _documents(data: str, model: TextReader) -> Iterator[bytes]:
    if data.startswith(SYNTHETIC_PREFIX):
        yield from (document.text.encode() for document in _task_documents(_task_corpus(data, model)))
        return
    if data != PYTHON_STDLIB and not Path(data).is_file():
        raise DataError(
            f"--data = '{data}' is not a file: give a text file, '{PYTHON_STDLIB}' or a synthetic task such as "
            f"'{SYNTHETIC_PREFIX}{Choices.name}'"
        )
    files = stdlib_files("validation") if data == PYTHON_STDLIB else [Path(data)]
    yield from (document for _, document in FilesInput(files, Fields()).documents(None))


def _task_corpus(data: str, model: TextReader) -> TaskCorpus:
    """Return the held-out documents of a task with the parameters that the model was trained with, or the default."""
    options = next((source.options for source in model.sources if source.path == data), None) or SyntheticConfig()
    task = build_task(task_kind(data, f"--data = '{data}'"), options, "--data")
    return TaskCorpus(task, "validation", options.seed)


def _task_documents(corpus: TaskCorpus) -> Iterator[Document]:
    return (corpus.document(number) for number in range(10**9))
