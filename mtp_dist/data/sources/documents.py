"""Documents of a source: plain text, or texts that are alternately read only and learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Self

from mtp_dist.errors import DataError


class PromptedDocument(bytes):
    """A prompt followed by its completion, perhaps several times; the tokens of prompts are targets of no head."""

    part_bytes: tuple[int, ...]
    """Bytes of each prompt and completion, in turn."""

    @classmethod
    def from_parts(cls, parts: Iterable[bytes]) -> Self:
        parts = tuple(parts)
        document = cls(b"".join(parts))
        document.part_bytes = tuple(map(len, parts))
        return document

    @property
    def parts(self) -> tuple[bytes, ...]:
        """Each prompt and completion, in turn."""
        return tuple(self[start:end] for start, end in pairwise(accumulate(self.part_bytes, initial=0)))


class Conversation(PromptedDocument):
    """A conversation as a chat template writes it; the assistant's turns are its completions.

    It is tokenized as a whole, and special tokens are recognized in it.
    """


def document_parts(document: bytes) -> tuple[bytes, ...]:
    """Return the prompts and completions, or the document alone if it has none."""
    return document.parts if isinstance(document, PromptedDocument) else (document,)


def with_valid_utf8(document: bytes) -> bytes:
    """Return the document with invalid UTF-8 replaced by U+FFFD."""
    parts = [part.decode(errors="replace").encode() for part in document_parts(document)]
    return type(document).from_parts(parts) if isinstance(document, PromptedDocument) else parts[0]


def encode_text(text: object, field: str, location: Callable[[], str]) -> bytes:
    """Return a field's value as bytes, empty for null. Raise DataError if it is not text."""
    if text is None:
        return b""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise DataError(
            f"{location()}: the field {field!r} is not text but {type(text).__name__}: choose another field"
        )
    for errors in ("strict", "surrogateescape", "surrogatepass"):
        try:
            return text.encode(errors=errors)
        except UnicodeEncodeError:
            continue
    raise AssertionError("surrogatepass encodes everything")
