"""Conversations as documents: a chat template writes the messages, and the assistant's turns are learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mtp_dist.data.sources.documents import Conversation, encode_text
from mtp_dist.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template itself marks what the assistant generates."""

Message = dict[str, Any]
Span = tuple[int, int]
"""First character of a part of a text, and the character after it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template for conversations, rendered by transformers."""

    tokenizer: str
    """Name of the tokenizer, for error messages."""
    source: str
    """The template, in Jinja."""
    variables: Mapping[str, str]
    """Named special tokens that the template may write, such as `bos_token`."""
    special_tokens: tuple[str, ...]
    """Every special token of the tokenizer."""

    def document(self, messages: object, field: str, location: Callable[[], str]) -> Conversation:
        """Return the conversation up to the end of the last turn of the assistant.

        Raise DataError with the location if `messages`, the value of `field`, are malformed, or if the template cannot
        write them or does not tell where the last turn of the assistant begins and ends.
        """
        checked = list(_checked_messages(messages, field, location))
        last = max(number for number, message in enumerate(checked) if message["role"] == "assistant")
        try:
            text, turns = self._mark(checked[: last + 1])  # nothing is learned from later messages
        except Exception as error:  # a template raises its own errors, and Python's for data that it does not expect
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{location()}: the chat template of {self.tokenizer!r} cannot write {field!r} ({reason}): fix the "
                "record, or leave it out"
            ) from None
        if not turns:
            raise DataError(
                f"{location()}: the chat template of {self.tokenizer!r} does not write the last turn of the assistant "
                f"in {field!r} right after its generation prompt, so that its tokens cannot be told from the others: "
                "enclose what the assistant generates in {% generation %} and {% endgeneration %} in the template"
            )
        bounds = [0, *(bound for turn in turns for bound in turn)]
        return Conversation.from_parts(encode_text(text[start:end], field, location) for start, end in pairwise(bounds))

    def _mark(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the text of messages that end with the assistant's, and the turns of the assistant to be learned.

        Without marks in the template, these are the turns that the text has in the same form as when they are
        generated: after the generation prompt, with nothing after them. A template may change a turn as soon as others
        follow, such as one that drops earlier reasoning; such a turn is not learned. Return no turns if the last one
        cannot be.
        """
        if GENERATION.search(self.source):
            return self._render(messages, return_assistant_tokens_mask=True)
        text, turns = self._render(messages)
        for number, message in enumerate(messages, 1):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[: number - 1], add_generation_prompt=True)
            after, _ = self._render(messages[:number])
            if text.startswith(after) and after.startswith(before) and after != before:
                turns.append((len(before), self._end_of_turn(before, after)))
            elif number == len(messages):
                return text, []
        return text, turns

    def _end_of_turn(self, before: str, after: str) -> int:
        """Return the end of a turn without the white space that follows a special token, such as `<|im_end|>`."""
        end = len(after.rstrip())
        return end if end > len(before) and after[:end].endswith(self.special_tokens) else len(after)

    def _render(self, messages: Sequence[Message], **options: bool) -> tuple[str, list[Span]]:
        """Return the text, and the turns that the template marks if `return_assistant_tokens_mask`."""
        from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds to import

        render: Any = render_jinja_template  # its annotation lacks the turns
        [text], turns = render([messages], chat_template=self.source, **options, **self.variables)
        return text, turns[0] if turns else []


def _checked_messages(messages: object, field: str, location: Callable[[], str]) -> Iterator[Message]:
    """Yield each message without keys that are null. Raise DataError if they are not messages to learn from."""
    if not isinstance(messages, list):
        raise DataError(
            f"{location()}: the field {field!r} is not a list of messages but {type(messages).__name__}: choose "
            'another messages_field, or write its value as [{"role": "user", "content": "..."}, ...]'
        )
    roles = set()
    for number, message in enumerate(messages):
        name = f"{location()}: {field}[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{name} is not an object with role and content but {type(message).__name__}: fix it")
        # In tables, each message has the keys of all.
        message = {key: value for key, value in message.items() if value is not None}
        if "role" not in message:
            keys = ", ".join(map(repr, message)) or "no keys"
            raise DataError(f'{name} has no role, it has {keys}: write it as {{"role": "user", "content": "..."}}')
        if message["role"] not in ROLES:
            raise DataError(f"{name} has the unknown role {message['role']!r}: use one of {', '.join(ROLES)}")
        content = message.get("content", "" if "tool_calls" in message else None)
        if not isinstance(content, str):
            raise DataError(f"{name}: the content is not text but {type(content).__name__}: fix it")
        roles.add(message["role"])
        yield message
    if "assistant" not in roles:
        raise DataError(
            f"{location()}: {field!r} has no message of the assistant, whose turns are learned: leave it out"
        )
