"""From text to token ids and back."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.errors import ConfigError, UserError

Ids = NDArray[Any]
"""uint16 or int32, see `dtype_of_ids`."""

SMALL_VOCABULARY = 65500
"""Below it ids are uint16, else int32: Megatron-core's `DType.optimal_dtype`."""


def dtype_of_ids(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """What ids of this vocabulary are kept as, in memory and on disk."""
    return np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32


class Tokenizer(ABC):
    """Text to ids and back. No special token is added, and none is read out of the text."""

    name: str
    """As in `data.tokenizer`."""
    vocab_size: int
    """Tokens, added ones included: every id is below it."""
    end_of_document: int
    """The id that follows each document."""
    accepts_raw_bytes: bool
    """Whether documents need not be UTF-8."""

    @abstractmethod
    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        """The ids of each document. Raises ConfigError for invalid UTF-8 unless `accepts_raw_bytes`."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of the ids: special tokens are skipped, invalid UTF-8 becomes U+FFFD."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of what decides which ids a text becomes."""

    def encode(self, text: str | bytes) -> Ids:
        """The ids of one document."""
        return self.encode_batch([text.encode() if isinstance(text, str) else text])[0]

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[Ids, list[int]]:
        """The ids of all documents in one array, an end-of-document id after each; and how many each has with it.

        A document without ids has no end either, and 0 in the list. Raises ConfigError like `encode_batch`.
        """
        end = np.array([self.end_of_document], dtype=self.dtype)
        encoded = self.encode_batch(documents)
        parts = [part for ids in encoded if len(ids) for part in (ids, end)]
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)
        return tokens, [len(ids) and len(ids) + 1 for ids in encoded]

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """Of the ids."""
        return dtype_of_ids(self.vocab_size)


class ByteTokenizer(Tokenizer):
    """One token a byte (ids 0 to 255) and an end-of-document token."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256
    accepts_raw_bytes = True

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        return [np.frombuffer(document, dtype=np.uint8).astype(np.uint16) for document in documents]

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        array = np.asarray(ids, dtype=np.int64)
        return array[array < self.end_of_document].astype(np.uint8).tobytes().decode(errors="replace")

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"one token a byte, 256 ends a document").hexdigest()


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[bytes], place: Callable[[int], str]
) -> tuple[Ids, list[int]]:
    """Return what the tokenizer's method of this name does. Raise ConfigError with the place of a document that it
    cannot encode."""
    try:
        return tokenizer.encode_documents(documents)
    except UserError:
        for number, document in enumerate(documents):
            try:
                tokenizer.encode_documents([document])
            except UserError as error:
                raise ConfigError(f"{place(number)}: {error}") from None
        raise


def build_tokenizer(name: str, key: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer that `key` names; nothing is downloaded.

    `bytes`; a `tokenizer.json` or SentencePiece `.model` file, or a folder with one; or a name in the Hugging Face
    cache. Raises ConfigError, naming `key`.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    # The libraries behind them take seconds to import, which a run with bytes need not spend.
    from mtp_dist.data.text_tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, tokenizer_file

    named = f"{key} = {name!r}"
    file = tokenizer_file(name, named)
    kind = SentencePieceTokenizer if file.suffix == ".model" else HuggingFaceTokenizer
    return kind(name, file, named)
