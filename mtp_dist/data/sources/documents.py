"""Documents made of the fields of a record: one text, or a prompt and its completion."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple


class PromptedDocument(bytes):
    """A prompt followed by its completion; the tokens of the prompt are targets of no head."""

    prompt_bytes: int
    """Bytes that belong to the prompt."""

    @classmethod
    def from_texts(cls, prompt: bytes, completion: bytes) -> PromptedDocument:
        document = cls(prompt + completion)
        document.prompt_bytes = len(prompt)
        return document


class Fields(NamedTuple):
    """The names of the fields that a document is made of."""

    text: str = "text"
    """Field with the text, or with the completion if there is a prompt."""
    prompt: str | None = None
    """Field with the prompt."""

    @property
    def names(self) -> tuple[str, ...]:
        """All fields, in the order of their texts in the document."""
        return (self.text,) if self.prompt is None else (self.prompt, self.text)

    def missing(self, present: Container[str]) -> str | None:
        """Return the first field that is not among those present."""
        return next((name for name in self.names if name not in present), None)

    def key(self, name: str) -> str:
        """Return the option or configuration key that selects a field."""
        if self.prompt is None:
            return "field"
        return "prompt_field" if name == self.prompt else "completion_field"

    def document(self, texts: Sequence[bytes]) -> bytes:
        """Return the document of the fields' texts; empty if the text or the completion is."""
        if self.prompt is None or not texts[-1]:
            return texts[-1]
        return PromptedDocument.from_texts(*texts)


def document_parts(document: bytes) -> tuple[bytes, ...]:
    """Return the prompt and the completion, or the document alone if it has no prompt."""
    if not isinstance(document, PromptedDocument):
        return (document,)
    return document[: document.prompt_bytes], document[document.prompt_bytes :]


def with_valid_utf8(document: bytes) -> bytes:
    """Return the document with invalid UTF-8 replaced by U+FFFD."""
    parts = [part.decode(errors="replace").encode() for part in document_parts(document)]
    return PromptedDocument.from_texts(*parts) if len(parts) > 1 else parts[0]
