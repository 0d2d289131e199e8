"""From text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.config import Config, ConfigError


class ByteTokenizer:
    """One token a byte (ids 0 to 255) and an end-of-document token."""

    name = "bytes"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str | bytes) -> NDArray[np.uint16]:
        """Ids of the text's UTF-8 bytes, or of the bytes as they are; no special token is added."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of the ids: special tokens are skipped, invalid UTF-8 becomes U+FFFD."""
        array = np.asarray(ids, dtype=np.int64)
        return array[array < self.end_of_document].astype(np.uint8).tobytes().decode(errors="replace")


def build_tokenizer(name: str) -> ByteTokenizer:
    """The tokenizer that `data.tokenizer` names. Raises ConfigError for an unknown name."""
    if name != ByteTokenizer.name:
        raise ConfigError(f"data.tokenizer = {name!r} is not known: use '{ByteTokenizer.name}'")
    return ByteTokenizer()


def vocabulary_size(config: Config) -> int:
    """`model.vocab_size`, or the tokenizer's where absent. Raises ConfigError where the tokenizer has more."""
    needed = build_tokenizer(config.data.tokenizer).vocab_size
    if config.model.vocab_size is not None and config.model.vocab_size < needed:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is below the {needed} tokens of data.tokenizer = "
            f"'{config.data.tokenizer}': raise it or leave it out"
        )
    return config.model.vocab_size or needed
