"""The training samples and validation sets of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mtp_dist.config import Config, SourceConfig
from mtp_dist.data.blending import BlendedSamples, first_phase
from mtp_dist.data.corpus import (
    DOCUMENTS_CHECKED,
    Corpus,
    check_document_ends,
    check_tokenizer,
    tokens_below,
    unigram_entropy,
)
from mtp_dist.data.run_sources import RunSources, content_key
from mtp_dist.data.samples import Cut, PackedCorpus
from mtp_dist.data.sources.documents import with_valid_utf8
from mtp_dist.data.sources.input import Input, Shard
from mtp_dist.data.streaming import StreamedSamples, TokenStream
from mtp_dist.data.text_loss import CHECKED_BYTES, TextLoss, measure_text_loss
from mtp_dist.data.tokenizer import Tokenizer, encode_documents, without_marks
from mtp_dist.distributed.launcher import env_rank
from mtp_dist.errors import ConfigError, DataError, UserError

UNIT_BYTES = 16 << 20
"""Text per work unit that is read and tokenized at once."""


class TrainingSamples(Protocol):
    """The samples of a run by number: (step - 1) * global batch size + index in the batch."""

    shards: int
    """Shards per source; if there are several, each data-parallel rank has the state of those that it reads."""

    def read(self, first: int, count: int, rank: int = 0, ranks: int = 1) -> NDArray[np.int64]:
        """Return a data-parallel rank's part of the samples first .. first + count - 1, [count / ranks, S + lookahead].

        `count` is a multiple of `ranks`.
        """

    def epochs(self, num_samples: int) -> list[float]:
        """Return how many times each source has been read after the first `num_samples` samples."""

    def state(self) -> Any:
        """Return as JSON what a resume needs in addition to the number of the next sample."""

    def restore(self, state: Any, samples_read: int, earlier: Sequence[int | None]) -> None:
        """Continue after `samples_read` samples from a state in which source i has number earlier[i], None if new."""


class ValidationSamples:
    """Up to num_samples evenly spaced samples of a corpus, the same in every run."""

    def __init__(self, corpus: PackedCorpus, num_samples: int) -> None:
        self.corpus = corpus
        self._num_samples = min(num_samples, len(corpus))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Return sample number `index`, [S + lookahead]."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        self.corpus.check_file()
        return self.corpus[index * len(self.corpus) // self._num_samples]


@dataclass(frozen=True)
class ValidationSet:
    """The samples of one validation, and two baselines for its losses."""

    name: str | None
    samples: ValidationSamples
    unigram_entropy: float
    """Entropy in nats per token, prompts excluded; a model with a higher loss does not use the context."""
    bytes_per_token: float
    """Bytes of text per token, end-of-document tokens included: bits per byte = nats / ln 2 / bytes_per_token."""


@dataclass(frozen=True)
class Datasets:
    tokenizer: Tokenizer
    train: TrainingSamples
    train_names: tuple[str, ...]
    """Names of the training sources; numbers of those without a name."""
    fingerprints: tuple[str, ...]
    """Fingerprints of the training sources: they differ if the data differ."""
    validation: tuple[ValidationSet, ...]
    descriptions: tuple[str, ...]
    """A line about each source that was read into memory or that loses text to the tokenizer."""

    def epochs(self, num_samples: int) -> dict[str, float]:
        """Return by source how many times it has been read after the first `num_samples` samples."""
        return dict(zip(self.train_names, self.train.epochs(num_samples), strict=True))

    def state(self, samples_read: int, train_state: Any) -> dict[str, Any]:
        """Return the state that a checkpoint stores, as JSON. train_state is that of `train`."""
        return {"read": samples_read, "fingerprints": list(self.fingerprints), "train": train_state}

    def restore(self, state: dict[str, Any], may_change: bool) -> int:
        """Continue each source from a state. Return the number of samples read before.

        Raise ConfigError if the data of a source changed, unless it `may_change`.
        """
        saved = state["fingerprints"]
        if saved != list(self.fingerprints) and not may_change:
            pairs = zip_longest(saved, self.fingerprints)
            number = next(number for number, (before, now) in enumerate(pairs) if before != now)
            raise ConfigError(
                f"data.train.{number} differs from the data that the run was trained on so far: restore the old data, "
                "start from scratch with checkpoint.resume=none, or continue with the new data with "
                "checkpoint.allow_changes=[data.train]"
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
    """Return a state of `Datasets` with positions, which older checkpoints lack, derived from their config.

    config: the one that the state was saved with and all its samples were read with.
    """
    if state["train"] is not None:
        return state
    cut = Cut(config.train.sequence_length, config.heads.lookahead, config.run.seed)
    return state | {
        "train": first_phase([source.weight for source in config.data.train], [cut] * len(config.data.train))
    }


def load_datasets(config: Config, sources: RunSources | None = None) -> Datasets:
    """Open prepared corpora; read, tokenize and pack other sources. `sources` are opened if they are not passed.

    Raise UserError, naming the key, if a source is missing, unreadable, empty or shorter than one sample.
    """
    sources = sources or RunSources(config)
    tokenizer, corpora = sources.tokenizer, _Corpora(config, sources)
    validation = [
        _validation_set(source, key, corpora.open(source, key), config, tokenizer)
        for key, source in ((f"data.validation.{index}", each) for index, each in enumerate(config.data.validation))
    ]
    train, fingerprints = _training_samples(config, corpora)
    return Datasets(
        tokenizer=tokenizer,
        train=train,
        fingerprints=fingerprints,
        train_names=tuple(source.name or str(index) for index, source in enumerate(config.data.train)),
        validation=tuple(validation),
        descriptions=tuple(corpora.descriptions),
    )


def _training_samples(config: Config, corpora: _Corpora) -> tuple[TrainingSamples, tuple[str, ...]]:
    """Return the samples and each source's fingerprint."""
    sources = {f"data.train.{index}": source for index, source in enumerate(config.data.train)}
    weights = [source.weight for source in sources.values()]
    if config.data.train[0].stream:
        inputs = {key: corpora.sources.input(source, key) for key, source in sources.items()}
        for key, key_input in inputs.items():
            corpora.check_prompts(config.data.has_prompts, config.data.messages_field is not None, key)
            with _naming_source(key, sources[key]):
                corpora.check_stream(key_input, key)
        shards = [Shard(index, config.data.stream_shards) for index in range(config.data.stream_shards)]
        streams = [
            [
                TokenStream(inputs[key], corpora.sources.tokenizer, f"{key}.path = '{source.path}'", shard)
                for shard in shards
            ]
            for key, source in sources.items()
        ]
        samples = StreamedSamples(streams, weights, config.train.sequence_length, config.heads.lookahead)
        return samples, tuple(key_input.fingerprint() for key_input in inputs.values())
    opened = [corpora.open(source, key) for key, source in sources.items()]
    blended = BlendedSamples([corpus.packed for corpus in opened], weights, config.run.seed)
    return blended, tuple(corpus.fingerprint for corpus in opened)


@dataclass(frozen=True)
class _OpenedCorpus:
    packed: PackedCorpus
    bytes_per_token: float | None
    """None if the bytes of text are unknown, also because a part of it are prompts."""
    fingerprint: str


class _Corpora:
    """The packed corpora of a run; a source that several keys name is read once."""

    def __init__(self, config: Config, sources: RunSources) -> None:
        self.config = config
        self.sources = sources
        self.descriptions: list[str] = []
        self._opened: dict[SourceConfig, _OpenedCorpus] = {}

    def open(self, source: SourceConfig, key: str) -> _OpenedCorpus:
        """Return a source as packed tokens. Raise UserError, naming `key`."""
        content = content_key(source)
        if content not in self._opened:
            corpus = self.sources.corpus(source, key)
            has_prompts = corpus.has_prompts if corpus else self.config.data.has_prompts
            has_conversations = corpus.has_conversations if corpus else self.config.data.messages_field is not None
            self.check_prompts(has_prompts, has_conversations, key)
            tokens, num_bytes, fingerprint = self._prepared(corpus, source, key) if corpus else self._read(source, key)
            try:
                packed = PackedCorpus(tokens, self.config.train.sequence_length, self.config.heads.lookahead)
            except UserError as error:
                raise DataError(f"{key}.path = '{source.path}' is too small: {error}") from None
            bytes_per_token = None if num_bytes is None or has_prompts else num_bytes / len(tokens)
            self._opened[content] = _OpenedCorpus(packed, bytes_per_token, fingerprint)
        return self._opened[content]

    def _prepared(self, corpus: Corpus, source: SourceConfig, key: str) -> tuple[Any, int | None, str]:
        for option in ("split", "subset", "stream"):
            if getattr(source, option):
                raise ConfigError(
                    f"{key}.{option} does not apply to '{source.path}', which is a prepared corpus: remove the key, or "
                    "prepare that part as a corpus of its own"
                )
        if self.config.data.has_prompts and not corpus.has_prompts:
            names = ["messages"] if self.config.data.messages_field else ["prompt", "completion"]
            options = " ".join(f"--{name}-field ..." for name in names)
            raise ConfigError(
                f"data.{names[0]}_field does not apply to {key}.path = '{source.path}', a prepared corpus without "
                f"prompts: prepare it with `mtp-dist prepare {options}`; to blend texts with and without prompts, "
                "prepare both and remove the key"
            )
        check_tokenizer(corpus, self.sources.tokenizer)
        if masks := self._document_masks():
            check_document_ends(corpus, self.sources.tokenizer, masks)
        if corpus.has_conversations:
            lengths = corpus.document_lengths[:DOCUMENTS_CHECKED]
            self._check_turn_ends(corpus.tokens[: lengths.sum()], lengths, key)
        self._check_text_loss(corpus.text_loss, key)
        counts = f"{len(corpus.tokens)} tokens, {corpus.documents} documents"
        tokens = tokens_below(self.config.vocab_size, corpus)
        return tokens, corpus.bytes_with_tokens, corpus.description.sha256 if corpus.description else counts

    def _read(self, source: SourceConfig, key: str) -> tuple[NDArray[Any], int, str]:
        """Return the tokens, in memory, the bytes of text that they represent, and their fingerprint."""
        label, enough = f"{key}.path = '{source.path}'", None
        if source.stream:  # in validation: as many tokens as its samples need
            train = self.config.train
            enough = train.validation_samples * train.sequence_length + self.config.heads.lookahead
        parts, num_bytes, num_tokens, num_documents = [], 0, 0, 0
        documents_input, loss = self.sources.input(source, key), TextLoss()
        with _naming_source(key, source):
            for unit in documents_input.units(UNIT_BYTES):
                documents = list(unit.documents())
                tokens, lengths = encode_documents(self.sources.tokenizer, documents, unit.location)
                self._check_turn_ends(tokens, lengths, key)
                loss.add(measure_text_loss(self.sources.tokenizer, documents, tokens, lengths))
                parts.append(tokens)
                num_bytes += sum(map(len, documents))
                num_documents += len(documents)
                num_tokens += len(tokens)
                if enough is not None and num_tokens >= enough:
                    break
        self._check_text_loss(loss, key)
        counts = [f"{num_documents:,} documents, {num_bytes:,} bytes of text", *documents_input.files.describe()]
        if not num_tokens:
            raise DataError(f"{label} has no document with text ({'; '.join(counts)}): name another source")
        self.descriptions.append(f"{key}: {'; '.join(counts)}")
        tokens = np.concatenate(parts)
        return tokens, loss.surviving(num_bytes), hashlib.sha256(tokens.data).hexdigest()

    def _document_masks(self) -> str:
        """Return the keys that keep documents apart, with their values; empty if there are none."""
        names = ("loss_across_documents", "attention_across_documents")
        return " and ".join(f"data.{name} = false" for name in names if not getattr(self.config.data, name))

    def _check_turn_ends(self, tokens: NDArray[Any], lengths: Sequence[int] | NDArray[Any], key: str) -> None:
        """Raise ConfigError if documents of these lengths are kept apart, and parts of them would be, too."""
        tokenizer, masks = self.sources.tokenizer, self._document_masks()
        if masks and np.count_nonzero(without_marks(tokens) == tokenizer.end_of_document) > np.count_nonzero(lengths):
            raise ConfigError(
                f"{key} has conversations in which the end-of-document token of '{tokenizer.name}' also ends turns, so "
                f"that {masks} would make each turn a document: set it to true"
            )

    def check_prompts(self, has_prompts: bool, has_conversations: bool, key: str) -> None:
        """Raise ConfigError if a loss would count tokens of prompts."""
        if has_conversations and self.config.heads.token_order:
            raise ConfigError(
                f"heads.token_order ranks the tokens of the next turn, and {key} has conversations, of which only the "
                "assistant's turns are to be learned: remove heads.token_order"
            )
        if has_prompts and self.config.heads.token_order and self.config.data.loss_across_documents:
            raise ConfigError(
                f"heads.token_order ranks the tokens of the next document, and {key} has prompts, which are not to be "
                "learned: set data.loss_across_documents=false or remove heads.token_order"
            )

    def check_stream(self, source: Input, key: str) -> None:
        """Measure on rank 0 how much text of a stream's first documents the tokenizer loses."""
        if self.sources.tokenizer.accepts_raw_bytes or env_rank():
            return
        documents: list[bytes] = []
        num_bytes = 0
        for _, document in source.documents(None):
            documents.append(with_valid_utf8(document))
            num_bytes += len(document)
            if num_bytes >= CHECKED_BYTES:
                break
        tokens, lengths = self.sources.tokenizer.encode_documents(documents)
        self._check_turn_ends(tokens, lengths, key)
        self._check_text_loss(measure_text_loss(self.sources.tokenizer, documents, tokens, lengths), key)

    def _check_text_loss(self, loss: TextLoss, key: str) -> None:
        name = self.sources.tokenizer.name
        loss.check(self.config.data.max_text_loss, "data.max_text_loss", f"{key}.path", name)
        if loss.lost_bytes:
            self.descriptions.append(f"{key}: {loss.describe(name)}")


@contextmanager
def _naming_source(key: str, source: SourceConfig) -> Iterator[None]:
    """Let errors begin with the key and path of the source."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{key}.path = '{source.path}': cannot read {error.filename} ({error.strerror})") from None
    except UserError as error:
        raise error if str(error).startswith(key) else type(error)(f"{key}.path = '{source.path}': {error}") from None


def _validation_set(
    source: SourceConfig, key: str, corpus: _OpenedCorpus, config: Config, tokenizer: Tokenizer
) -> ValidationSet:
    samples = ValidationSamples(corpus.packed, config.train.validation_samples)
    tokens = np.concatenate([samples[index] for index in range(len(samples))])
    tokens = tokens[tokens >= 0]  # without prompts
    if not len(tokens):
        raise DataError(
            f"{key}.path = '{source.path}' has only prompts in its {len(samples)} validation samples: raise "
            "train.validation_samples or train.sequence_length"
        )
    # At least one byte in total: special tokens alone have no text.
    bytes_per_token = corpus.bytes_per_token or max(1, len(tokenizer.decode(tokens).encode())) / len(tokens)
    return ValidationSet(source.name, samples, unigram_entropy(np.bincount(tokens)), bytes_per_token)
