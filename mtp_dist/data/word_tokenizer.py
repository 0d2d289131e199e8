"""The tokenizer of a synthetic task: one token per word."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.config.synthetic import SYNTHETIC_PREFIX
from mtp_dist.data.synthetic.task import Task
from mtp_dist.data.tokenizer import Ids, Tokenizer
from mtp_dist.errors import DataError


class WordTokenizer(Tokenizer):
    """A tokenizer with one token per word of a task, in their order, and an end-of-document token."""

    accepts_raw_bytes = False

    def __init__(self, task: type[Task]) -> None:
        self.name = SYNTHETIC_PREFIX + task.name
        self.words = task.words
        self.end_of_document = len(self.words)
        self.vocab_size = len(self.words) + 1
        self._ids = {word: number for number, word in enumerate(self.words)}

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        return [np.array(self._encode(document), dtype=self.dtype) for document in documents]

    def _encode(self, document: bytes) -> list[int]:
        try:
            return [self._ids[word] for word in document.decode().split()]
        except UnicodeDecodeError as error:
            raise DataError(f"invalid UTF-8 at byte {error.start}") from None
        except KeyError as error:
            raise DataError(
                f"'{self.name}' has no token for {error}: use it for the source of the same name only"
            ) from None

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        return " ".join(self.words[token] for token in np.asarray(ids).tolist() if token < self.end_of_document)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()
