"""Tokenizers: from text to token ids and back."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.sources.documents import Conversation, PromptedDocument, document_parts
from mtp_dist.errors import DataError, UserError

Ids = NDArray[Any]
"""uint16 or int32, see `id_dtype`. The id of a prompt's token is stored as its bitwise complement, a negative number:
the mark stays with the token when samples are cut, shuffled and read again."""

SMALL_VOCABULARY = 65500
"""Vocabulary size below which ids are uint16, else int32 (Megatron-core's `DType.optimal_dtype`)."""


def id_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the dtype of token ids in memory and on disk."""
    return np.uint16 if vocab_size < SMALL_VOCABULARY else np.int32


def mark_prompt(ids: Ids) -> Ids:
    """Return the ids of a prompt's tokens as they are stored, int32."""
    return ~ids.astype(np.int32)


def without_marks(ids: Ids) -> Ids:
    """Return the ids of all tokens, also those of prompts."""
    return np.where(ids < 0, ~ids, ids) if ids.dtype.kind == "i" else ids


class Tokenizer(ABC):
    """A tokenizer that neither adds special tokens nor recognizes them in the text."""

    name: str
    """Name as in `data.tokenizer`."""
    vocab_size: int
    """Number of tokens including added ones; every id is smaller."""
    end_of_document: int
    """Id of the token that follows each document."""
    accepts_raw_bytes: bool
    """True if documents may contain bytes that are not UTF-8."""

    @abstractmethod
    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        """Return the ids of each document. Raise DataError for invalid UTF-8 unless `accepts_raw_bytes`."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of the ids. Skip special tokens; replace invalid UTF-8 by U+FFFD."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of everything that decides which ids a text becomes."""

    def encode(self, text: str | bytes) -> Ids:
        """Return the ids of one document."""
        return self.encode_batch([text.encode() if isinstance(text, str) else text])[0]

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[Ids]:
        """Return the ids of each conversation, those of prompts marked, without an end-of-document token that ends it.

        Raise DataError like `encode_batch`.
        """
        assert not conversations, "this tokenizer has no chat template, with which conversations are written"
        return []

    def decode_with_special_tokens(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of the ids like `decode`, but with the names of special tokens."""
        return self.decode(ids)

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[Ids, list[int]]:
        """Return the ids of all documents in one array, an end-of-document id after each, and the documents' lengths.

        The lengths include the end. A document without ids gets no end either; its length is 0. Raise DataError like
        `encode_batch`. A prompt is encoded on its own, as it is when the model is used, and its ids are marked.
        """
        end = np.array([self.end_of_document], dtype=self.dtype)
        conversations = [document for document in documents if isinstance(document, Conversation)]
        others = [document for document in documents if not isinstance(document, Conversation)]
        conversations_ids = iter(self.encode_conversations(conversations))
        parts_ids = iter(self.encode_batch([part for document in others for part in document_parts(document)]))
        encoded = [
            next(conversations_ids)
            if isinstance(document, Conversation)
            else np.concatenate([mark_prompt(next(parts_ids)), next(parts_ids)])
            if isinstance(document, PromptedDocument)
            else next(parts_ids)
            for document in documents
        ]
        parts = [part for ids in encoded if len(ids) for part in (ids, end)]
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)
        return tokens, [len(ids) and len(ids) + 1 for ids in encoded]

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        return id_dtype(self.vocab_size)


class ByteTokenizer(Tokenizer):
    """A tokenizer with one token per byte (ids 0 to 255) and an end-of-document token."""

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
    tokenizer: Tokenizer, documents: Sequence[bytes], location: Callable[[int], str]
) -> tuple[Ids, list[int]]:
    """Call `tokenizer.encode_documents`. Raise DataError with the location of a document that it cannot encode."""
    try:
        return tokenizer.encode_documents(documents)
    except UserError:
        for number, document in enumerate(documents):
            try:
                tokenizer.encode_documents([document])
            except UserError as error:
                raise DataError(f"{location(number)}: {error}") from None
        raise
