"""Documents as one stream of tokens, and the stream as samples of fixed length.

Shapes: S is `train.sequence_length`, the lookahead is the last prediction distance of the heads: n by default.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.errors import ConfigError


def unigram_entropy(tokens: NDArray[Any], vocab_size: int) -> float:
    """Entropy of the tokens' frequencies in nats: the loss of the best model that ignores the context."""
    return entropy_of(np.bincount(tokens, minlength=vocab_size))


def entropy_of(counts: NDArray[np.int64]) -> float:
    """The same from how often each token occurs."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


class PackedCorpus:
    """Samples of S + lookahead tokens that advance by S: a head at distance d has the labels `sample[d : d + S]`.

    Over all samples these labels are the tokens d .. d + len(self) * S - 1, each of them once. Fewer than S tokens at
    the end of the stream are left out.
    """

    def __init__(self, tokens: Any, sequence_length: int, lookahead: int) -> None:
        """`tokens` are an array, or what can be sliced like one. Raises ConfigError if they do not fill one sample."""
        needed = sequence_length + lookahead
        if len(tokens) < needed:
            raise ConfigError(
                f"{len(tokens)} tokens are fewer than one sample needs, train.sequence_length + tokens to look ahead = "
                f"{sequence_length} + {lookahead} = {needed}: add text, lower train.sequence_length, or look less far "
                "ahead with heads.prediction_distances or heads.token_order_window"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.lookahead = lookahead

    def __len__(self) -> int:
        return (len(self.tokens) - self.lookahead) // self.sequence_length

    @property
    def sample_length(self) -> int:
        """S + lookahead."""
        return self.sequence_length + self.lookahead

    def check_file(self) -> None:
        """Raise ConfigError where the file below memory-mapped tokens has become shorter since it was opened.

        To read what it lost would end the process by SIGBUS, without a word. A file that is deleted keeps its content
        until it is closed.
        """
        stored = getattr(self.tokens, "stored", self.tokens)  # below tokens whose ids are checked
        if not isinstance(stored, np.memmap) or not isinstance(stored.base, mmap.mmap):
            return
        try:
            size = stored.base.size()
        except OSError as error:
            raise ConfigError(f"cannot read {stored.filename} any more ({error.strerror})") from None
        if size < stored.nbytes:
            raise ConfigError(
                f"{stored.filename} has {size} bytes, it had {stored.nbytes} when the run began: it was cut "
                "off or is being written anew; restore it, and the same command goes on from the last checkpoint"
            )

    def tokens_of(self, index: int) -> NDArray[Any]:
        """Sample number `index`, [S + lookahead], in the corpus's own type."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.sequence_length
        tokens: NDArray[Any] = self.tokens[start : start + self.sample_length]
        return tokens

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """The same as int64."""
        return self.tokens_of(index).astype(np.int64)
