"""Training samples from documents that are tokenized while they are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.blending import Blend
from mtp_dist.data.sources.documents import with_valid_utf8
from mtp_dist.data.sources.input import UNSPLIT, Input, Shard
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import ConfigError, DataError, UserError

State = dict[str, Any]
"""A position as JSON."""


class _Document(NamedTuple):
    tokens: NDArray[Any]
    """Its tokens, the end-of-document token included."""
    position: Any
    """Its position in the input."""
    passes: int
    """Complete passes over the shard before it."""


class TokenStream:
    """The tokens of one shard of an input's documents, an end-of-document token after each, in endless passes."""

    def __init__(self, source: Input, tokenizer: Tokenizer, label: str, shard: Shard = UNSPLIT) -> None:
        """Begin at the first document. label: start of error messages, such as `data.train.0.path = 'web'`."""
        self._source = source
        self._tokenizer = tokenizer
        self._label = label
        self._shard = shard
        self.restore({"passes": 0, "position": None, "offset": 0})

    @property
    def passes(self) -> int:
        """Number of complete passes over the shard."""
        return self._waiting[0].passes if self._waiting else self._start["passes"]

    def next_tokens(self, length: int, advance: int) -> NDArray[np.int64]:
        """Return the next `length` tokens and advance by `advance` < `length` tokens. Raise DataError."""
        while self._available < length:
            document = next(self._documents)
            self._waiting.append(document)
            self._available += len(document.tokens)
        tokens = np.empty(length, dtype=np.int64)
        filled, start = 0, self._offset
        for document in self._waiting:
            part = document.tokens[start : start + length - filled]
            tokens[filled : filled + len(part)] = part
            filled, start = filled + len(part), 0
            if filled == length:
                break
        self._offset += advance
        self._available -= advance
        while self._offset >= len(self._waiting[0].tokens):
            self._offset -= len(self._waiting.popleft().tokens)
        return tokens

    def state(self) -> State:
        """Return the position: the first document with unused tokens, and how many of its tokens are used."""
        if not self._waiting:
            return self._start
        first = self._waiting[0]
        return {"passes": first.passes, "position": first.position, "offset": self._offset}

    def restore(self, state: State) -> None:
        """Continue from a position."""
        self._start = state
        self._offset: int = state["offset"]
        self._available = -self._offset
        self._waiting: deque[_Document] = deque()
        self._documents = self._read(state["passes"], state["position"])

    def _read(self, passes: int, position: Any) -> Iterator[_Document]:
        has_text = position is not None
        while True:
            try:
                for start, document in self._source.documents(position, self._shard):
                    if not self._tokenizer.accepts_raw_bytes:
                        # Invalid UTF-8 is replaced: one bad document must not end a run of months.
                        document = with_valid_utf8(document)
                    tokens, _ = self._tokenizer.encode_documents([document])
                    if len(tokens):
                        has_text = True
                        yield _Document(tokens, start, passes)
            except UserError as error:
                raise type(error)(f"{self._label}: {error}") from None
            if not has_text:
                remedy = f" in {self._shard}: lower data.stream_shards" if self._shard.num_shards > 1 else ""
                raise DataError(f"{self._label} has no document with text{remedy or ': name another source'}")
            passes, position = passes + 1, None


class StreamedSamples:
    """The counterpart of `BlendedSamples` for sources that can only be read from start to end.

    Nothing is shuffled: each source is split into K shards, and sample i comes from shard i mod K of one of them, in
    the order of that shard's documents. The samples are the same at every layout, and a rank reads only the shards that
    its samples come from.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[TokenStream]],
        weights: Sequence[float],
        sequence_length: int,
        lookahead: int,
    ) -> None:
        """Begin at the first document of each of the K shards of each source."""
        self.sources = tuple(sources)
        self.shards = len(sources[0])
        self.blend = Blend(weights)
        self.sequence_length = sequence_length
        self.lookahead = lookahead
        self._next = 0
        self._own_shards = range(self.shards)
        """Shards that this rank reads."""

    def read(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> NDArray[np.int64]:
        """Return this rank's part of the samples first .. first + count - 1, [count / ranks, S + lookahead].

        Samples are dealt to the ranks one by one, so a rank reads every gcd(K, ranks)-th shard; those of a single shard
        are dealt in slices. A rank reads its shards up to the last of the samples, whichever rank that belongs to.
        `first` must not decrease.
        """
        assert first >= self._next, "a stream is read forward only"
        num_own, stride = count // ranks, gcd(self.shards, ranks)
        self._own_shards = range(rank % stride, self.shards, stride)
        samples = np.empty((num_own, self.sequence_length + self.lookahead), dtype=np.int64)
        filled = 0
        for number, source in self._located(first + count):
            tokens = self.sources[source][number % self.shards].next_tokens(samples.shape[1], self.sequence_length)
            owner = number % ranks if self.shards > 1 else (number - first) // num_own
            if number >= first and owner == rank:
                samples[filled] = tokens
                filled += 1
        self._next = first + count
        return samples

    def _located(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield each sample up to `end` that comes from a shard of this rank, and its source."""
        numbers = np.arange(self._next, end)
        numbers = numbers[np.isin(numbers % self.shards, self._own_shards)]
        # Shifting the blend from shard to shard keeps its proportions within each shard as well as across shards.
        indices = numbers // self.shards + numbers % self.shards
        start = int(indices.min())
        sources, _ = self.blend.locate(start, int(indices.max()) + 1 - start)
        return zip(numbers.tolist(), sources[indices - start].tolist(), strict=True)

    def epochs(self, num_samples: int) -> list[float]:
        """Return the complete passes over each source, judged by the shards of this rank, which reads ahead."""
        return [float(min(shards[number].passes for number in self._own_shards)) for shards in self.sources]

    def state(self) -> State:
        """Return the position of each shard, None for those that this rank does not read."""
        streams = [
            [stream.state() if number in self._own_shards else None for number, stream in enumerate(shards)]
            for shards in self.sources
        ]
        return {"next": self._next, "streams": streams}

    def restore(self, state: State | None, samples_read: int, earlier: Sequence[int | None]) -> None:
        """Continue each source from its position in a state, at any layout at which no rank has to read backwards.

        state: of all shards or of this rank's; None if this rank does not read. earlier: number of each source in the
        state, None if it is new and starts from its beginning. Raise ConfigError if the number of shards differs.
        """
        continued = [pair for pair in zip(self.sources, earlier, strict=True) if pair[1] is not None]
        if state is None or not continued:
            self._next = samples_read
            return
        for shards, number in continued:
            saved = state["streams"][number]
            saved = [saved] if isinstance(saved, dict) else saved  # older states have no shards
            if len(saved) != self.shards:
                raise ConfigError(
                    f"data.stream_shards is {self.shards}, the checkpoint's streams have {len(saved)} shards: set it "
                    "back, or start from scratch with checkpoint.resume=none"
                )
            for stream, position in zip(shards, saved, strict=True):
                if position is not None:
                    stream.restore(position)
        self._next = state["next"]


def merge_states(states: Sequence[State | None]) -> State | None:
    """Merge the states of the data-parallel ranks, each with its own shards, into one of all shards."""
    given = [state for state in states if state is not None]
    if not given:
        return None
    streams = [
        [
            next((position for position in positions if position is not None), None)
            for positions in zip(*shards, strict=True)
        ]
        for shards in zip(*(state["streams"] for state in given), strict=True)
    ]
    return {"next": given[0]["next"], "streams": streams}
