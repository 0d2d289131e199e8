"""Everything that a run reads, from its configuration."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_dist.config import Config, SourceConfig
from mtp_dist.data.blending import BlendedSamples, first_phase
from mtp_dist.data.corpus import Corpus, check_document_ends, check_tokenizer, tokens_below, unigram_entropy
from mtp_dist.data.run_sources import RunSources, contents_of
from mtp_dist.data.samples import Cut, PackedCorpus
from mtp_dist.data.sources.text_sources import Input, Shard
from mtp_dist.data.streaming import StreamedSamples, TokenStream
from mtp_dist.data.text_loss import CHECKED_BYTES, TextLoss, measure_loss
from mtp_dist.data.tokenizer import Tokenizer, encode_documents
from mtp_dist.errors import ConfigError, UserError

READ_AT_ONCE_BYTES = 16 << 20


class TrainingSamples(Protocol):
    """The samples of a run by their numbers: number (step - 1) * global batch size + position in the batch."""

    shards: int
    """Parts of each source; if there are several, each data-parallel rank knows the state of those it reads."""

    def read(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> NDArray[np.int64]:
        """Return a data-parallel rank's part of the samples first .. first + count - 1, [count / ranks, S + lookahead].

        `count` is a multiple of `ranks`.
        """

    def epochs(self, num_samples: int) -> list[float]:
        """How many times each source has been read after the first `num_samples` samples."""

    def state(self) -> Any:
        """As JSON, what a run needs beside the number of the next sample to go on from here."""

    def restore(self, state: Any, samples_read: int, earlier: Sequence[int | None]) -> None:
        """Continue after so many samples from a state, in which source i is number earlier[i]; None: it is new."""


class ValidationSamples:
    """Up to num_samples samples of a corpus, spaced evenly: the same in every run."""

    def __init__(self, corpus: PackedCorpus, num_samples: int) -> None:
        self.corpus = corpus
        self._num_samples = min(num_samples, len(corpus))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample number `index`, [S + lookahead]."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        self.corpus.check_file()
        return self.corpus[index * len(self.corpus) // self._num_samples]


@dataclass(frozen=True)
class ValidationSet:
    """What a validation reads, and two figures of its samples to judge its losses by."""

    name: str | None
    samples: ValidationSamples
    unigram_entropy: float
    """Nats per token; a model above it has not learned to use the context."""
    bytes_per_token: float
    """Bytes of text / tokens, end-of-document included: bits per byte = nats / ln 2 / bytes_per_token."""


@dataclass(frozen=True)
class Datasets:
    tokenizer: Tokenizer
    train: TrainingSamples
    train_names: tuple[str, ...]
    """Of the training sources: their names, or their numbers."""
    fingerprints: tuple[str, ...]
    """Of the training sources: what tells their data from other data."""
    validation: tuple[ValidationSet, ...]
    notices: tuple[str, ...] = ()
    """A line about each source that was read or that the tokenizer loses text of."""

    def epochs(self, num_samples: int) -> dict[str, float]:
        """By source, how many times it has been read after the first `num_samples` samples."""
        return dict(zip(self.train_names, self.train.epochs(num_samples), strict=True))

    def state(self, samples_read: int, of_train: Any) -> dict[str, Any]:
        """As JSON, for a checkpoint; of_train is the state of `train`."""
        return {"read": samples_read, "fingerprints": list(self.fingerprints), "train": of_train}

    def restore(self, state: dict[str, Any], may_change: bool) -> int:
        """Continue from a state, each source after what was read of it. Return the number of samples read before.

        Raise ConfigError if the sources have other data than they had, unless they `may_change`.
        """
        saved = state["fingerprints"]
        if saved != list(self.fingerprints) and not may_change:
            pairs = zip_longest(saved, self.fingerprints)
            number = next(number for number, (before, now) in enumerate(pairs) if before != now)
            raise ConfigError(
                f"data.train.{number} has other data than the run was trained on so far: give it the same, start anew "
                "with checkpoint.resume=none, or go on with the new data with checkpoint.allow_changes=[data.train]"
            )
        left = list(enumerate(saved))
        earlier: list[int | None] = []
        for fingerprint in self.fingerprints:
            found = next((item for item in left if item[1] == fingerprint), None)
            earlier.append(found and found[0])
            if found:
                left.remove(found)
        self.train.restore(state["train"], state["read"], earlier)
        return int(state["read"])


def with_positions(state: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return a state of `Datasets` with the positions that one from before they were saved implies.

    config: the one that the state was saved with. All its samples were read with it.
    """
    if state["train"] is not None:
        return state
    cut = Cut(config.train.sequence_length, config.heads.lookahead, config.run.seed)
    return state | {
        "train": first_phase([source.weight for source in config.data.train], [cut] * len(config.data.train))
    }


def load_datasets(config: Config, sources: RunSources | None = None) -> Datasets:
    """Open prepared corpora, and read, tokenize and pack other sources. `sources` are those of the configuration.

    Raise ConfigError, naming the key, if a source is missing, unreadable, empty or shorter than one sample.
    """
    sources = sources or RunSources(config)
    tokenizer, corpora = sources.tokenizer, _Corpora(config, sources)
    validation = [
        _validation_set(source, corpora.open(source, f"data.validation.{index}"), config, tokenizer)
        for index, source in enumerate(config.data.validation)
    ]
    train, fingerprints = _training_samples(config, corpora)
    return Datasets(
        tokenizer=tokenizer,
        train=train,
        fingerprints=fingerprints,
        train_names=tuple(source.name or str(index) for index, source in enumerate(config.data.train)),
        validation=tuple(validation),
        notices=tuple(corpora.notices),
    )


def _training_samples(config: Config, corpora: _Corpora) -> tuple[TrainingSamples, tuple[str, ...]]:
    """The samples, and each source's fingerprint."""
    sources = {f"data.train.{index}": source for index, source in enumerate(config.data.train)}
    weights = [source.weight for source in sources.values()]
    if config.data.train[0].stream:
        inputs = {key: corpora.sources.input(source, key) for key, source in sources.items()}
        for key, of_key in inputs.items():
            corpora.check_stream(of_key, key)
        number_of = config.data.stream_shards
        streams = [
            [
                TokenStream(
                    of_key, corpora.sources.tokenizer, f"{key}.path = '{sources[key].path}'", Shard(i, number_of)
                )
                for i in range(number_of)
            ]
            for key, of_key in inputs.items()
        ]
        samples = StreamedSamples(streams, weights, config.train.sequence_length, config.heads.lookahead)
        return samples, tuple(of_key.fingerprint() for of_key in inputs.values())
    opened = [corpora.open(source, key) for key, source in sources.items()]
    blended = BlendedSamples([corpus.packed for corpus in opened], weights, config.run.seed)
    return blended, tuple(corpus.fingerprint for corpus in opened)


@dataclass(frozen=True)
class _Opened:
    packed: PackedCorpus
    bytes_per_token: float | None
    """None where nobody has counted the bytes."""
    fingerprint: str


class _Corpora:
    """Reads sources; what several keys name is read once."""

    def __init__(self, config: Config, sources: RunSources) -> None:
        self.config = config
        self.sources = sources
        self._opened: dict[SourceConfig, _Opened] = {}
        self.notices: list[str] = []
        """What was read, and what was lost of it."""

    def open(self, source: SourceConfig, key: str) -> _Opened:
        """Raises ConfigError, naming `key`."""
        same = contents_of(source)
        if same not in self._opened:
            corpus = self.sources.corpus(source, key)
            tokens, num_bytes, fingerprint = self._prepared(corpus, source, key) if corpus else self._read(source, key)
            try:
                packed = PackedCorpus(tokens, self.config.train.sequence_length, self.config.heads.lookahead)
            except UserError as error:
                raise ConfigError(f"{key}.path = '{source.path}' is too small: {error}") from None
            bytes_per_token = None if num_bytes is None else num_bytes / len(tokens)
            self._opened[same] = _Opened(packed, bytes_per_token, fingerprint)
        return self._opened[same]

    def _prepared(self, corpus: Corpus, source: SourceConfig, key: str) -> tuple[Any, int | None, str]:
        for option in ("split", "subset", "stream"):
            if getattr(source, option):
                raise ConfigError(
                    f"{key}.{option} chooses what is read of a source, '{source.path}' is prepared already: leave it "
                    "out, or prepare what you want"
                )
        check_tokenizer(corpus, self.sources.tokenizer)
        keys = ("loss_across_documents", "attention_across_documents")
        if masks := [f"data.{name} = false" for name in keys if not getattr(self.config.data, name)]:
            check_document_ends(corpus, self.sources.tokenizer, " and ".join(masks))
        self._check_loss(corpus.loss, key)
        counts = f"{len(corpus.tokens)} tokens, {corpus.documents} documents"
        tokens = tokens_below(self.config.vocab_size, corpus)
        return tokens, corpus.bytes_with_tokens, corpus.description.sha256 if corpus.description else counts

    def _read(self, source: SourceConfig, key: str) -> tuple[NDArray[Any], int, str]:
        """Return the tokens, all in memory, the bytes of text that they stand for, and their fingerprint."""
        named = f"{key}.path = '{source.path}'"
        enough = None
        if source.stream:  # only for validation: as many tokens as will be read
            train = self.config.train
            enough = train.validation_samples * train.sequence_length + self.config.heads.lookahead
        parts, num_bytes, num_tokens, num_documents = [], 0, 0, 0
        of_key, loss = self.sources.input(source, key), TextLoss()
        try:
            for unit in of_key.units(READ_AT_ONCE_BYTES):
                documents = list(unit.documents())
                tokens, lengths = encode_documents(self.sources.tokenizer, documents, unit.place)
                loss.add(measure_loss(self.sources.tokenizer, documents, tokens, lengths))
                parts.append(tokens)
                num_bytes += sum(map(len, documents))
                num_documents += len(documents)
                num_tokens += len(tokens)
                if enough is not None and num_tokens >= enough:
                    break
        except OSError as error:
            raise ConfigError(f"{named}: cannot read {error.filename} ({error.strerror})") from None
        except UserError as error:
            raise ConfigError(str(error) if str(error).startswith(key) else f"{named}: {error}") from None
        self._check_loss(loss, key)
        became = [f"{num_documents:,} documents, {num_bytes:,} bytes of text", *of_key.files.describe()]
        if not num_tokens:
            raise ConfigError(f"{named} has no document with text ({'; '.join(became)}): give another source")
        self.notices.append(f"{key}: {'; '.join(became)}")
        tokens = np.concatenate(parts)
        return tokens, loss.surviving(num_bytes), hashlib.sha256(tokens.data).hexdigest()

    def check_stream(self, of_key: Input, key: str) -> None:
        """Measure what the tokenizer loses of a stream's first documents, on rank 0: others need not read them too."""
        if self.sources.tokenizer.accepts_raw_bytes or int(os.environ.get("RANK", 0)):
            return
        documents: list[bytes] = []
        num_bytes = 0
        for _, document in of_key.documents(None):
            documents.append(document.decode(errors="replace").encode())
            num_bytes += len(document)
            if num_bytes >= CHECKED_BYTES:
                break
        tokens, lengths = self.sources.tokenizer.encode_documents(documents)
        self._check_loss(measure_loss(self.sources.tokenizer, documents, tokens, lengths), key)

    def _check_loss(self, loss: TextLoss, key: str) -> None:
        name = self.sources.tokenizer.name
        loss.check(self.config.data.max_text_loss, "data.max_text_loss", f"{key}.path", name)
        if loss.lost_bytes:
            self.notices.append(f"{key}: {loss.describe(name)}")


def _validation_set(source: SourceConfig, corpus: _Opened, config: Config, tokenizer: Tokenizer) -> ValidationSet:
    samples = ValidationSamples(corpus.packed, config.train.validation_samples)
    tokens = np.concatenate([samples[index] for index in range(len(samples))])
    # At least a byte in all: special tokens alone have no text.
    bytes_per_token = corpus.bytes_per_token or max(1, len(tokenizer.decode(tokens).encode())) / len(tokens)
    return ValidationSet(source.name, samples, unigram_entropy(np.bincount(tokens)), bytes_per_token)
