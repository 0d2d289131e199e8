"""Measurement of the text that is lost when it is encoded and decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mtp_dist.data.sources.documents import Conversation
from mtp_dist.data.tokenizer import Ids, Tokenizer, without_marks
from mtp_dist.errors import DataError

CHECKED_BYTES = 256 << 10
"""Bytes per part of a source that are decoded again: decoding takes about a seventh of the time of encoding."""
CHARACTERS_SHOWN = 5


@dataclass
class TextLoss:
    """Counts of checked and lost text."""

    checked_bytes: int = 0
    lost_bytes: int = 0
    lost_whitespace: int = 0
    """Lost bytes that are whitespace, which many tokenizers fold on purpose."""
    characters: Counter[str] = field(default_factory=Counter)
    """Number of times that each other character was lost."""

    def add(self, other: TextLoss) -> None:
        self.checked_bytes += other.checked_bytes
        self.lost_bytes += other.lost_bytes
        self.lost_whitespace += other.lost_whitespace
        self.characters += other.characters

    @property
    def _lost_text(self) -> int:
        return self.lost_bytes - self.lost_whitespace

    def surviving(self, num_bytes: int) -> int:
        """Return how many of these bytes of text are represented by tokens."""
        return round(num_bytes * (1 - self.lost_bytes / self.checked_bytes)) if self.lost_bytes else num_bytes

    def most_lost(self) -> str:
        return "".join(character for character, _ in self.characters.most_common(CHARACTERS_SHOWN))

    def describe(self, tokenizer: str) -> str:
        most = f", most of all {', '.join(map(repr, self.most_lost()))}" if self.characters else ""
        whitespace = self.lost_whitespace / max(1, self.checked_bytes)
        folded = f"; whitespace is lost in addition, {whitespace:.2%} of the text" if whitespace else ""
        return (
            f"{self._lost_text / max(1, self.checked_bytes):.2%} of the text does not survive encoding and decoding "
            f"with '{tokenizer}' (of {self.checked_bytes:,} bytes checked){most}{folded}"
        )

    def check(self, limit: float, option: str, label: str, tokenizer: str, unread_bytes: float = 0) -> None:
        """Raise DataError, starting with `label`, if the lost fraction of the text, whitespace excluded, exceeds the
        limit that `option` sets even if all of `unread_bytes` more survive."""
        if self._lost_text > limit * (self.checked_bytes + unread_bytes):
            raise DataError(
                f"{label}: {self.describe(tokenizer)}; {option} = {limit:g} allows less: use a tokenizer with a token "
                "for every byte, such as byte pairs trained with initial_alphabet=ByteLevel.alphabet(), or raise "
                f"{option}"
            )


def measure_text_loss(
    tokenizer: Tokenizer, documents: Sequence[bytes], tokens: Ids, lengths: Sequence[int]
) -> TextLoss:
    """Measure the first documents, up to CHECKED_BYTES. `tokens` and `lengths` are their encoding."""
    loss = TextLoss()
    if tokenizer.accepts_raw_bytes:
        return loss
    begin = 0
    for document, length in zip(documents, lengths, strict=True):
        if loss.checked_bytes >= CHECKED_BYTES:
            break
        decoded = _decode(tokenizer, document, without_marks(tokens[begin : begin + length])) if length else ""
        lost = lost_characters(document.decode(), decoded)
        whitespace = Counter({character: count for character, count in lost.items() if character.isspace()})
        loss.add(TextLoss(len(document), _num_bytes(lost), _num_bytes(whitespace), lost - whitespace))
        begin += length
    return loss


def _decode(tokenizer: Tokenizer, document: bytes, ids: Ids) -> str:
    """Return the text of a document's ids, of which the last one ends it."""
    if isinstance(document, Conversation):  # special tokens are a part of its text, perhaps also the last one
        return tokenizer.decode_with_special_tokens(ids)
    return tokenizer.decode(ids[:-1])


def _num_bytes(characters: Counter[str]) -> int:
    return sum(len(character.encode()) * count for character, count in characters.items())


def lost_characters(text: str, decoded: str) -> Counter[str]:
    """Return how often each character of the text is missing in the decoded text, wherever it is there."""
    return Counter() if text == decoded else Counter(text) - Counter(decoded)
