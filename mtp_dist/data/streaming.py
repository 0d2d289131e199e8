"""Training samples of documents that are tokenized while they are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtp_dist.config import ConfigError
from mtp_dist.data.blending import Blend
from mtp_dist.data.inputs import Input
from mtp_dist.data.tokenizer import Tokenizer

State = dict[str, Any]
"""JSON."""


class _Document(NamedTuple):
    tokens: NDArray[Any]
    """With the end-of-document token."""
    position: Any
    """In the input."""
    passes: int
    """Times that the whole input was read before."""


class TokenStream:
    """The tokens of an input's documents, an end-of-document token after each, over and over."""

    def __init__(self, source: Input, tokenizer: Tokenizer, named: str) -> None:
        """`named` is how errors begin, such as `data.train.0.path = 'web'`."""
        self._source = source
        self._tokenizer = tokenizer
        self._named = named
        self._begin({"passes": 0, "position": None, "offset": 0})

    @property
    def passes(self) -> int:
        """Times that the whole input has been read."""
        return self._waiting[0].passes if self._waiting else self._start["passes"]

    def take(self, length: int, advance: int) -> NDArray[np.int64]:
        """The next `length` tokens; those after them begin `advance` < `length` tokens later. Raises ConfigError."""
        while self._available < length:
            document = next(self._documents)
            self._waiting.append(document)
            self._available += len(document.tokens)
        taken = np.empty(length, dtype=np.int64)
        filled, start = 0, self._offset
        for tokens, _, _ in self._waiting:
            part = tokens[start : start + length - filled]
            taken[filled : filled + len(part)] = part
            filled, start = filled + len(part), 0
            if filled == length:
                break
        self._offset += advance
        self._available -= advance
        while self._offset >= len(self._waiting[0].tokens):
            self._offset -= len(self._waiting.popleft().tokens)
        return taken

    def state(self) -> State:
        """Where it is: the first document that samples are still to come from, and how many of its tokens are used."""
        if not self._waiting:
            return self._start
        first = self._waiting[0]
        return {"passes": first.passes, "position": first.position, "offset": self._offset}

    def restore(self, state: State) -> None:
        """Go on from there."""
        self._begin(state)

    def _begin(self, state: State) -> None:
        self._start = state
        self._offset: int = state["offset"]
        self._available = -self._offset
        self._waiting: deque[_Document] = deque()
        self._documents = self._read(state["passes"], state["position"])

    def _read(self, passes: int, position: Any) -> Iterator[_Document]:
        has_text = position is not None
        while True:
            try:
                for place, document in self._source.documents(position):
                    if not self._tokenizer.takes_any_bytes:
                        # Invalid UTF-8 is replaced: a run of months must not end for one document.
                        document = document.decode(errors="replace").encode()
                    tokens, _ = self._tokenizer.encode_documents([document])
                    if len(tokens):
                        has_text = True
                        yield _Document(tokens, place, passes)
            except ConfigError as error:
                raise ConfigError(f"{self._named}: {error}") from None
            if not has_text:
                raise ConfigError(f"{self._named} has no document with text: give another source")
            passes, position = passes + 1, None


class StreamedSamples:
    """The counterpart of `BlendedSamples` for sources that can only be read from their start to their end.

    Samples are in the order of the documents: nothing is shuffled. Each rank reads all of them, those of others to
    skip them, so the samples are the same at every layout.
    """

    def __init__(
        self, streams: Sequence[TokenStream], weights: Sequence[float], sequence_length: int, lookahead: int
    ) -> None:
        self.streams = tuple(streams)
        self.blend = Blend(weights)
        self.sequence_length = sequence_length
        self.lookahead = lookahead
        self._next = 0

    def read(self, first: int, count: int) -> NDArray[np.int64]:
        """Samples number first .. first + count - 1, [count, S + lookahead]; `first` never goes back."""
        assert first >= self._next, "a stream has no way back"
        sources, _ = self.blend.locate(self._next, first + count - self._next)
        samples = np.empty((count, self.sequence_length + self.lookahead), dtype=np.int64)
        for number, source in enumerate(sources, self._next - first):
            sample = self.streams[source].take(samples.shape[1], self.sequence_length)
            if number >= 0:  # the others are those of other ranks
                samples[number] = sample
        self._next = first + count
        return samples

    def epochs(self, num_samples: int) -> list[float]:
        """How many times each source has been read whole, as far as this process has read ahead."""
        return [float(stream.passes) for stream in self.streams]

    def state(self) -> State:
        """Where it is."""
        return {"next": self._next, "streams": [stream.state() for stream in self.streams]}

    def restore(self, state: State, samples_read: int, earlier: Sequence[int | None]) -> None:
        """Continue each source from its place in a state, at any layout at which no rank has to go back.

        earlier: the number that each source has in the state; None for a new one, which begins at its start.
        """
        for stream, number in zip(self.streams, earlier, strict=True):
            if number is not None:
                stream.restore(state["streams"][number])
        continued = any(number is not None for number in earlier)
        self._next = state["next"] if continued else samples_read
