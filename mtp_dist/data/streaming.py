"""Training samples of datasets that are read while they come in, without being prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_dist.config import ConfigError
from mtp_dist.data.blending import Blend
from mtp_dist.data.documents import bytes_of_text, missing_field
from mtp_dist.data.inputs import InputOptions, open_stream
from mtp_dist.data.tokenizer import Tokenizer

State = dict[str, Any]
"""JSON."""


class TokenStream:
    """The tokens of a dataset's documents, an end-of-document token after each, over and over."""

    def __init__(self, path: str, options: InputOptions, tokenizer: Tokenizer) -> None:
        """Raises ConfigError where the source cannot be opened."""
        self.passes = 0
        """Times that the whole dataset has been read."""
        self._path = path
        self._options = options
        self._tokenizer = tokenizer
        self._has_text = False
        self._waiting: NDArray[Any] = np.empty(0, dtype=tokenizer.dtype)
        """Tokens that no sample has had yet."""
        self._start_pass()

    def take(self, length: int, advance: int) -> NDArray[np.int64]:
        """The next `length` tokens; the one after that begins `advance` tokens later. Raises ConfigError."""
        parts, waiting = [self._waiting], len(self._waiting)
        while waiting < length:
            parts.append(next(self._documents))
            waiting += len(parts[-1])
        tokens = np.concatenate(parts)
        self._waiting = tokens[advance:]
        return tokens[:length].astype(np.int64)

    def state(self) -> State:
        """Where it is."""
        return {"passes": self.passes, "position": self._dataset.state_dict(), "waiting": self._waiting.tolist()}

    def restore(self, state: State) -> None:
        """Go on from there. Raises ConfigError where the dataset cannot."""
        self._start_pass()
        self.passes, self._has_text = state["passes"], True
        self._waiting = np.array(state["waiting"], dtype=self._tokenizer.dtype)
        self._dataset.load_state_dict(state["position"])

    def _start_pass(self) -> None:
        self._dataset, self._field = open_stream(self._path, self._options)
        self._documents = self._tokens_of_documents()

    def _tokens_of_documents(self) -> Iterator[NDArray[Any]]:
        while True:
            for row in self._dataset:
                tokens, _ = self._tokenizer.encode_documents([self._text_of(row)])
                if len(tokens):
                    self._has_text = True
                    yield tokens
            if not self._has_text:
                raise ConfigError(f"{self._options.named(self._path)} has no document with text: give another source")
            self.passes += 1
            self._dataset, self._field = open_stream(self._path, self._options)

    def _text_of(self, row: dict[str, Any]) -> bytes:
        """Invalid UTF-8 is replaced: a run of months must not end for one document."""
        named = self._options.named(self._path)
        if self._field not in row:
            raise missing_field(named, self._field, row)
        return bytes_of_text(row[self._field], self._field, lambda: named).decode(errors="replace").encode()


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
        length = self.sequence_length + self.lookahead
        read = [self.streams[source].take(length, self.sequence_length) for source in sources]
        self._next = first + count
        return np.stack(read[len(read) - count :])

    def epochs(self, num_samples: int) -> list[float]:
        """How many times each source has been read whole so far; how long the pass under way is nobody knows."""
        return [float(stream.passes) for stream in self.streams]

    def state(self) -> State:
        """Where it is."""
        return {"next": self._next, "streams": [stream.state() for stream in self.streams]}

    def restore(self, state: State) -> None:
        """Go on from there; at another layout too, as long as no rank has to go back."""
        self._next = state["next"]
        for stream, of_stream in zip(self.streams, state["streams"], strict=True):
            stream.restore(of_stream)
