"""Training samples of documents that are tokenized while they are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtp_dist.data.blending import Blend
from mtp_dist.data.sources.text_sources import WHOLE, Input, Shard
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import ConfigError, UserError

State = dict[str, Any]
"""JSON."""


class _Document(NamedTuple):
    tokens: NDArray[Any]
    """With the end-of-document token."""
    position: Any
    """In the input."""
    passes: int
    """Times that the whole shard was read before."""


class TokenStream:
    """The tokens of a shard of an input's documents, an end-of-document token after each, over and over."""

    def __init__(self, source: Input, tokenizer: Tokenizer, named: str, shard: Shard = WHOLE) -> None:
        """`named` is how errors begin, such as `data.train.0.path = 'web'`."""
        self._source = source
        self._tokenizer = tokenizer
        self._named = named
        self._shard = shard
        self._begin({"passes": 0, "position": None, "offset": 0})

    @property
    def passes(self) -> int:
        """Times that the whole shard has been read."""
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
                for place, document in self._source.documents(position, self._shard):
                    if not self._tokenizer.accepts_raw_bytes:
                        # Invalid UTF-8 is replaced: a run of months must not end for one document.
                        document = document.decode(errors="replace").encode()
                    tokens, _ = self._tokenizer.encode_documents([document])
                    if len(tokens):
                        has_text = True
                        yield _Document(tokens, place, passes)
            except UserError as error:
                raise ConfigError(f"{self._named}: {error}") from None
            if not has_text:
                where = f" in {self._shard}: lower data.stream_shards" if self._shard.number_of > 1 else ""
                raise ConfigError(f"{self._named} has no document with text{where or ': give another source'}")
            passes, position = passes + 1, None


class StreamedSamples:
    """The counterpart of `BlendedSamples` for sources that can only be read from their start to their end.

    Nothing is shuffled: each source is in K shards, and sample i comes from shard i mod K of one of the sources, in the
    order of that shard's documents. The samples are the same at every layout, and a rank reads only the shards that its
    samples come from.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[TokenStream]],
        weights: Sequence[float],
        sequence_length: int,
        lookahead: int,
    ) -> None:
        """`sources` are the shards of each source, as many of each."""
        self.sources = tuple(sources)
        self.shards = len(sources[0])
        self.blend = Blend(weights)
        self.sequence_length = sequence_length
        self.lookahead = lookahead
        self._next = 0
        self._own_shards = range(self.shards)
        """Those that this rank reads."""

    def read(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> NDArray[np.int64]:
        """Return this rank's part of the samples first .. first + count - 1, [count / ranks, S + lookahead].

        Samples are dealt to the ranks one by one, so a rank reads every gcd(K, ranks)-th shard; a single shard's are
        dealt in slices. Own shards are read up to the last of the samples, whoever they belong to. `first` never goes
        back.
        """
        assert first >= self._next, "a stream has no way back"
        share, stride = count // ranks, gcd(self.shards, ranks)
        self._own_shards = range(rank % stride, self.shards, stride)
        samples = np.empty((share, self.sequence_length + self.lookahead), dtype=np.int64)
        filled = 0
        for number, source in self._located(first + count):
            taken = self.sources[source][number % self.shards].take(samples.shape[1], self.sequence_length)
            owner = number % ranks if self.shards > 1 else (number - first) // share
            if number >= first and owner == rank:
                samples[filled] = taken
                filled += 1
        self._next = first + count
        return samples

    def _located(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield each sample up to `end` that comes from an own shard, and its source."""
        numbers = np.arange(self._next, end)
        numbers = numbers[np.isin(numbers % self.shards, self._own_shards)]
        # A blend that is shifted from shard to shard has its proportions in each shard as well as across them.
        places = numbers // self.shards + numbers % self.shards
        start = int(places.min())
        sources, _ = self.blend.locate(start, int(places.max()) + 1 - start)
        return zip(numbers.tolist(), sources[places - start].tolist(), strict=True)

    def epochs(self, num_samples: int) -> list[float]:
        """How many times each source has been read whole, as far as this process has read ahead, by its own shards."""
        return [float(min(shards[number].passes for number in self._own_shards)) for shards in self.sources]

    def state(self) -> State:
        """Where it is; None for shards that this rank does not read."""
        streams = [
            [stream.state() if number in self._own_shards else None for number, stream in enumerate(shards)]
            for shards in self.sources
        ]
        return {"next": self._next, "streams": streams}

    def restore(self, state: State | None, samples_read: int, earlier: Sequence[int | None]) -> None:
        """Continue each source from its place in a state, at any layout at which no rank has to go back.

        state: of all shards, or this rank's own; None if it did not read. earlier: the number that each source has in
        the state; None for a new one, which begins at its start. Raise ConfigError for another number of shards.
        """
        continued = [pair for pair in zip(self.sources, earlier, strict=True) if pair[1] is not None]
        if state is None or not continued:
            self._next = samples_read
            return
        for shards, number in continued:
            saved = state["streams"][number]
            saved = [saved] if isinstance(saved, dict) else saved  # streams had no shards once
            if len(saved) != self.shards:
                raise ConfigError(
                    f"data.stream_shards is {self.shards}, the checkpoint's streams are in {len(saved)} shards: set it "
                    "back, or start from scratch with checkpoint.resume=none"
                )
            for stream, position in zip(shards, saved, strict=True):
                if position is not None:
                    stream.restore(position)
        self._next = state["next"]


def merge_states(states: Sequence[State | None]) -> State | None:
    """Return the state of all shards from those of the data-parallel ranks, each of which has its own shards."""
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
