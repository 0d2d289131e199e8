"""How much of a text does not survive encoding and decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from mtp_dist.config import ConfigError
from mtp_dist.data.tokenizer import Ids, Tokenizer

CHECKED_BYTES = 256 << 10
"""Text of a part of a source that is decoded again: decoding takes about a seventh of the time of encoding."""
CHARACTERS_SHOWN = 5


@dataclass
class TextLoss:
    """What was lost of the text that was checked."""

    checked_bytes: int = 0
    lost_bytes: int = 0
    characters: Counter[str] = field(default_factory=Counter)
    """How often characters were lost."""

    @property
    def share(self) -> float:
        return self.lost_bytes / self.checked_bytes if self.checked_bytes else 0.0

    def add(self, other: TextLoss) -> None:
        self.checked_bytes += other.checked_bytes
        self.lost_bytes += other.lost_bytes
        self.characters += other.characters

    def surviving(self, num_bytes: int) -> int:
        """Return how many of these bytes of text tokens stand for."""
        return round(num_bytes * (1 - self.share)) if self.lost_bytes else num_bytes

    def most_lost(self) -> str:
        return "".join(character for character, _ in self.characters.most_common(CHARACTERS_SHOWN))

    def describe(self, tokenizer: str) -> str:
        most = f", most of all {', '.join(map(repr, self.most_lost()))}" if self.characters else ""
        return (
            f"{self.share:.2%} of the text does not survive encoding and decoding with '{tokenizer}' (of "
            f"{self.checked_bytes:,} bytes checked){most}"
        )

    def check(self, limit: float, option: str, named: str, tokenizer: str) -> None:
        """Raise ConfigError, which begins with `named`, if the share exceeds the limit that `option` sets."""
        if self.share > limit:
            raise ConfigError(
                f"{named}: {self.describe(tokenizer)}; {option} = {limit:g} allows less: use a tokenizer with a token "
                "for every byte, such as byte pairs trained with initial_alphabet=ByteLevel.alphabet(), or raise "
                f"{option}"
            )


def measure_loss(tokenizer: Tokenizer, documents: Sequence[bytes], tokens: Ids, lengths: Sequence[int]) -> TextLoss:
    """Measure the first documents, up to CHECKED_BYTES. `tokens` and `lengths` are what encoding them returned."""
    loss = TextLoss()
    if tokenizer.takes_any_bytes:
        return loss
    begin = 0
    for document, length in zip(documents, lengths, strict=True):
        if loss.checked_bytes >= CHECKED_BYTES:
            break
        decoded = tokenizer.decode(tokens[begin : begin + length - 1]) if length else ""
        lost = lost_characters(document.decode(), decoded)
        loss.add(TextLoss(len(document), sum(len(c.encode()) * count for c, count in lost.items()), lost))
        begin += length
    return loss


def lost_characters(text: str, decoded: str) -> Counter[str]:
    """Return how often characters of the text are missing in what was decoded, wherever they stand there."""
    return Counter() if text == decoded else Counter(text) - Counter(decoded)
