"""The text of tokens that are generated one after the other."""

from collections.abc import Sequence

from mtp_dist.data.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"
CONTEXT_TOKENS = 8
"""Tokens of the prompt that are decoded again, since a space between two words may depend on both."""


class Detokenizer:
    """The text after a prompt, in pieces that never end inside a character."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.context = list(prompt[-CONTEXT_TOKENS:])
        """Last tokens whose text has been returned."""
        self.pending: list[int] = []

    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        self.pending += tokens
        text = self._pending_text()
        return "" if text.endswith(INCOMPLETE) else self._take(text)

    def end(self) -> str:
        """Return the text of an incomplete character, which is U+FFFD."""
        return self._take(self._pending_text())

    def _pending_text(self) -> str:
        known = len(self.tokenizer.decode(self.context))
        return self.tokenizer.decode(self.context + self.pending)[known:]

    def _take(self, text: str) -> str:
        if text:
            self.context, self.pending = self.pending, []
        return text
