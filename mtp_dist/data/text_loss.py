"""How much of a text does not survive encoding and decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mtp_dist.data.tokenizer import Ids, Tokenizer
from mtp_dist.errors import ConfigError

CHECKED_BYTES = 256 << 10
"""Text of a part of a source that is decoded again: decoding takes about a seventh of the time of encoding."""
CHARACTERS_SHOWN = 5


@dataclass
class TextLoss:
    """What was lost of the text that was checked."""

    checked_bytes: int = 0
    lost_bytes: int = 0
    lost_whitespace: int = 0
    """Those of the lost bytes that are whitespace, which many tokenizers fold on purpose."""
    characters: Counter[str] = field(default_factory=Counter)
    """How often characters were lost that are not whitespace."""

    def add(self, other: TextLoss) -> None:
        self.checked_bytes += other.checked_bytes
        self.lost_bytes += other.lost_bytes
        self.lost_whitespace += other.lost_whitespace
        self.characters += other.characters

    @property
    def _lost_text(self) -> int:
        return self.lost_bytes - self.lost_whitespace

    def surviving(self, num_bytes: int) -> int:
        """Return how many of these bytes of text tokens stand for."""
        return round(num_bytes * (1 - self.lost_bytes / self.checked_bytes)) if self.lost_bytes else num_bytes

    def most_lost(self) -> str:
        return "".join(character for character, _ in self.characters.most_common(CHARACTERS_SHOWN))

    def describe(self, tokenizer: str) -> str:
        most = f", most of all {', '.join(map(repr, self.most_lost()))}" if self.characters else ""
        whitespace = self.lost_whitespace / max(1, self.checked_bytes)
        besides = f"; whitespace is lost in addition, {whitespace:.2%} of the text" if whitespace else ""
        return (
            f"{self._lost_text / max(1, self.checked_bytes):.2%} of the text does not survive encoding and decoding "
            f"with '{tokenizer}' (of {self.checked_bytes:,} bytes checked){most}{besides}"
        )

    def check(self, limit: float, option: str, named: str, tokenizer: str, unread_bytes: float = 0) -> None:
        """Raise ConfigError, which begins with `named`, if the share of the text that is lost, whitespace apart,
        exceeds the limit that `option` sets, even if `unread_bytes` more of it survive."""
        if self._lost_text > limit * (self.checked_bytes + unread_bytes):
            raise ConfigError(
                f"{named}: {self.describe(tokenizer)}; {option} = {limit:g} allows less: use a tokenizer with a token "
                "for every byte, such as byte pairs trained with initial_alphabet=ByteLevel.alphabet(), or raise "
                f"{option}"
            )


def measure_loss(tokenizer: Tokenizer, documents: Sequence[bytes], tokens: Ids, lengths: Sequence[int]) -> TextLoss:
    """Measure the first documents, up to CHECKED_BYTES. `tokens` and `lengths` are what encoding them returned."""
    loss = TextLoss()
    if tokenizer.accepts_raw_bytes:
        return loss
    begin = 0
    for document, length in zip(documents, lengths, strict=True):
        if loss.checked_bytes >= CHECKED_BYTES:
            break
        decoded = tokenizer.decode(tokens[begin : begin + length - 1]) if length else ""
        lost = lost_characters(document.decode(), decoded)
        whitespace = Counter({character: count for character, count in lost.items() if character.isspace()})
        loss.add(TextLoss(len(document), _num_bytes(lost), _num_bytes(whitespace), lost - whitespace))
        begin += length
    return loss


def _num_bytes(characters: Counter[str]) -> int:
    return sum(len(character.encode()) * count for character, count in characters.items())


def lost_characters(text: str, decoded: str) -> Counter[str]:
    """Return how often characters of the text are missing in what was decoded, wherever they stand there."""
    return Counter() if text == decoded else Counter(text) - Counter(decoded)
