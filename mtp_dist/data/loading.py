"""Everything that a run reads, from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtp_dist.config import Config, ConfigError
from mtp_dist.data.blending import BlendedSamples
from mtp_dist.data.packing import PackedCorpus, pack, unigram_entropy
from mtp_dist.data.sources import configured_sources, read_documents
from mtp_dist.data.tokenizer import ByteTokenizer, build_tokenizer


class ValidationSamples:
    """Up to num_samples samples spaced evenly over the corpora laid end to end: the same in every run.

    Fewer where the corpora have fewer. A corpus has as many samples as its length gives it; weights do not count.
    """

    def __init__(self, corpora: Sequence[PackedCorpus], num_samples: int) -> None:
        self.corpora = tuple(corpora)
        self._ends = np.cumsum([len(corpus) for corpus in corpora])
        total = int(self._ends[-1])
        self._num_samples = min(num_samples, total)
        self._indices = np.arange(self._num_samples) * total // self._num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sample number `index`, [S + lookahead]."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        place = int(self._indices[index])
        corpus = int(np.searchsorted(self._ends, place, side="right"))
        return self.corpora[corpus][place - int(self._ends[corpus]) + len(self.corpora[corpus])]


@dataclass(frozen=True)
class ValidationSet:
    """What a validation reads, and two figures of the whole validation corpora to judge its losses by."""

    samples: ValidationSamples
    unigram_entropy: float
    """Nats per token; a model above it has not learned to use the context."""
    bytes_per_token: float
    """Bytes of the documents / tokens, end-of-document included: bits per byte = nats / ln 2 / bytes_per_token."""


@dataclass(frozen=True)
class Datasets:
    tokenizer: ByteTokenizer
    train: BlendedSamples
    """Sample step * train.global_batch_size + position, for every step of the run."""
    validation: ValidationSet | None
    """None where `data.validation` is empty."""


@dataclass(frozen=True)
class _Corpus:
    packed: PackedCorpus
    num_bytes: int


def _load_corpora(config: Config, tokenizer: ByteTokenizer) -> dict[str, _Corpus]:
    """The corpus of every source by its key, such as `data.train.0`; what several keys name is read once."""
    read: dict[tuple[str, str], _Corpus] = {}
    by_key: dict[str, _Corpus] = {}
    for key, source in configured_sources(config):
        identity = (source.path, source.split)
        if identity not in read:
            documents = read_documents(source, key)
            try:
                packed = PackedCorpus(pack(documents, tokenizer), config.train.sequence_length, config.heads.lookahead)
            except ConfigError as error:
                raise ConfigError(
                    f"{key}.path = {source.path!r} (split: {source.split}) is too small: {error}"
                ) from None
            read[identity] = _Corpus(packed, sum(len(document) for document in documents))
        by_key[key] = read[identity]
    return by_key


def _validation_set(corpora: Sequence[_Corpus], num_samples: int, vocab_size: int) -> ValidationSet:
    tokens = np.concatenate([corpus.packed.tokens for corpus in corpora])
    return ValidationSet(
        samples=ValidationSamples([corpus.packed for corpus in corpora], num_samples),
        unigram_entropy=unigram_entropy(tokens, vocab_size),
        bytes_per_token=sum(corpus.num_bytes for corpus in corpora) / len(tokens),
    )


def load_datasets(config: Config) -> Datasets:
    """Read, tokenize and pack every source.

    Raises ConfigError, naming the key, where a source is missing, unreadable, empty or shorter than one sample.
    """
    tokenizer = build_tokenizer(config.data.tokenizer)
    by_key = _load_corpora(config, tokenizer)
    train = [corpus.packed for key, corpus in by_key.items() if key.startswith("data.train.")]
    validation = [corpus for key, corpus in by_key.items() if key.startswith("data.validation.")]
    return Datasets(
        tokenizer=tokenizer,
        train=BlendedSamples(
            corpora=train,
            weights=[source.weight for source in config.data.train],
            seed=config.run.seed,
            num_samples=config.train.steps * config.train.global_batch_size,
        ),
        validation=(
            _validation_set(validation, config.train.validation_samples, tokenizer.vocab_size) if validation else None
        ),
    )
