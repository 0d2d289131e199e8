"""The fields of a record that a document is made of."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

from mtp_dist.data.sources.conversations import ChatTemplate
from mtp_dist.data.sources.documents import PromptedDocument, encode_text


class Fields(NamedTuple):
    """The names of the fields that a document is made of."""

    text: str = "text"
    """Field with the text, with the completion if there is a prompt, or with the messages of a conversation."""
    prompt: str | None = None
    """Field with the prompt."""
    chat_template: ChatTemplate | None = None
    """What writes the messages as text."""

    @property
    def names(self) -> tuple[str, ...]:
        """All fields, in the order of their texts in the document."""
        return (self.text,) if self.prompt is None else (self.prompt, self.text)

    @property
    def need_records(self) -> bool:
        """Whether a text without fields, such as a file of code, cannot be a document."""
        return self.prompt is not None or self.chat_template is not None

    def missing(self, present: Container[str]) -> str | None:
        """Return the first field that is not among those present."""
        return next((name for name in self.names if name not in present), None)

    def key(self, name: str) -> str:
        """Return the option or configuration key that selects a field."""
        if self.chat_template is not None:
            return "messages_field"
        if self.prompt is None:
            return "field"
        return "prompt_field" if name == self.prompt else "completion_field"

    def document(self, values: Sequence[object], location: Callable[[], str]) -> bytes:
        """Return the document of the fields' values; empty if the text, the completion or the messages are.

        Raise DataError with the location if a value is not text, or not messages that the chat template can write.
        """
        if self.chat_template is not None:
            [messages] = values
            return b"" if messages is None else self.chat_template.document(messages, self.text, location)
        texts = [encode_text(value, name, location) for value, name in zip(values, self.names, strict=True)]
        return texts[-1] if self.prompt is None or not texts[-1] else PromptedDocument.from_parts(texts)
