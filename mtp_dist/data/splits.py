"""The rule that decides, for data without splits of its own, what is held out."""

import hashlib
from typing import Literal

Split = Literal["all", "train", "validation"]

VALIDATION_FRACTION = 0.05


def in_validation_split(key: str) -> bool:
    """Return whether what a key stands for belongs to `validation`. Only the key decides, such as a relative path."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_FRACTION * 2**64
