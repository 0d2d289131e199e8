"""A prepared corpus: PREFIX.bin and PREFIX.idx in Megatron-core's format, and PREFIX.json, which tells of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from mtp_dist.config import Section
from mtp_dist.data.indexed import Index, add_suffix, read_index
from mtp_dist.data.sources.work_units import InvalidUtf8
from mtp_dist.data.text_loss import TextLoss
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import ConfigError, UserError

SCAN_BLOCK_TOKENS = 1 << 24
DOCUMENTS_CHECKED = 1000


class TokenizerDescription(Section):
    name: str
    sha256: str
    """The tokenizer's fingerprint."""
    vocab_size: PositiveInt
    end_of_document: NonNegativeInt


class SourceDescription(Section):
    """What `mtp-dist prepare` was given."""

    inputs: tuple[str, ...]
    field: str
    glob: str | None
    subset: str | None
    split: str | None
    invalid_utf8: InvalidUtf8


class CorpusDescription(Section):
    """PREFIX.json."""

    format: Literal[1] = 1
    tokenizer: TokenizerDescription
    documents: NonNegativeInt
    tokens: NonNegativeInt
    """End-of-document tokens included."""
    bytes: NonNegativeInt
    """Of the documents' text."""
    empty_documents: NonNegativeInt
    """Left out, because they have no tokens."""
    empty_bytes: NonNegativeInt = 0
    """Of their text."""
    checked_bytes: NonNegativeInt = 0
    """Text that was decoded again; nothing by versions that did not measure it, and of tokenizers of bytes."""
    lost_bytes: NonNegativeInt = 0
    """Text that this did not bring back."""
    lost_whitespace: NonNegativeInt = 0
    """Bytes of whitespace in it."""
    replaced_documents: NonNegativeInt
    """Documents of which invalid UTF-8 was replaced by U+FFFD."""
    skipped_documents: NonNegativeInt
    """Left out for invalid UTF-8."""
    source: SourceDescription
    sha256: str
    """Of PREFIX.bin."""


@dataclass(frozen=True)
class Corpus:
    """A corpus that was opened; its tokens stay on disk."""

    prefix: Path
    key: str
    """Where it was named, such as `data.train.0.path`."""
    tokens: NDArray[Any]
    """All tokens, memory-mapped."""
    index: Index
    description: CorpusDescription | None
    """None where there is no PREFIX.json, as beside what Megatron-LM's own tools have made."""

    @property
    def documents(self) -> int:
        return len(self.index.boundaries) - 1

    @cached_property
    def document_lengths(self) -> NDArray[Any]:
        """Tokens of each document; memory-mapped where every document is one sequence, as in what we prepare."""
        lengths, boundaries = self.index.lengths, self.index.boundaries
        if len(lengths) == self.documents:
            return lengths
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return np.diff(ends[boundaries])

    @property
    def num_bytes(self) -> int | None:
        """Of the text, where it is known."""
        return self.description.bytes if self.description else None

    @property
    def loss(self) -> TextLoss:
        """What did not survive encoding and decoding, as far as it was measured."""
        found = self.description
        return TextLoss(found.checked_bytes, found.lost_bytes, found.lost_whitespace) if found else TextLoss()

    @property
    def bytes_with_tokens(self) -> int | None:
        """Text that tokens stand for, if the bytes were counted."""
        found = self.description
        if found is None or not found.lost_bytes:
            return self.num_bytes
        return self.loss.surviving(found.bytes + found.empty_bytes)

    def verify(self) -> None:
        """Read all of PREFIX.bin. Raises ConfigError where it is not what was written, or nobody knows what was."""
        file = add_suffix(self.prefix, ".bin")
        if self.description is None:
            raise ConfigError(f"{_named(self)}: no {self.prefix.name}.json says what {file} should hold")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.description.sha256:
            raise ConfigError(
                f"{_named(self)}: {file} has the SHA-256 {found}, it was written with {self.description.sha256}: it "
                "has changed since, copy or prepare it anew"
            )


def _named(corpus: Corpus) -> str:
    return f"{corpus.key} = '{corpus.prefix}'"


def prefix_of(path: str | Path) -> Path | None:
    """The prefix of a corpus that is named by it or by one of its files; None where the path is none of these."""
    path = Path(path)
    if path.suffix in (".bin", ".idx") or (path.suffix == ".json" and path.with_suffix(".idx").exists()):
        return path.with_suffix("")
    return path if any(add_suffix(path, suffix).exists() for suffix in (".bin", ".idx")) else None


def open_corpus(prefix: str | Path, key: str) -> Corpus:
    """Open and check a corpus without reading its tokens. Raises ConfigError, which begins with `key`."""
    prefix = Path(prefix)
    try:
        for suffix in (".bin", ".idx"):
            if not add_suffix(prefix, suffix).exists():
                raise ConfigError(
                    f"{add_suffix(prefix, suffix)} is missing: give another path, or copy the corpus anew"
                )
        index = read_index(add_suffix(prefix, ".idx"))
        return Corpus(prefix, key, _map_tokens(prefix, index), index, _read_description(prefix, index))
    except UserError as error:
        raise ConfigError(f"{key} = '{prefix}': {error}") from None
    except OSError as error:
        raise ConfigError(f"{key} = '{prefix}': cannot read {error.filename} ({error.strerror})") from None


def _map_tokens(prefix: Path, index: Index) -> NDArray[Any]:
    file = add_suffix(prefix, ".bin")
    expected = index.tokens * index.dtype.itemsize
    if (size := file.stat().st_size) != expected:
        raise ConfigError(
            f"{file} has {size} bytes, its index {add_suffix(prefix, '.idx')} speaks of {index.tokens} tokens of "
            f"{index.dtype.itemsize} bytes = {expected}: it was cut off or is another corpus's, copy or prepare it anew"
        )
    if not size:
        return np.empty(0, dtype=index.dtype)
    return np.memmap(file, mode="r", dtype=index.dtype)


def _read_description(prefix: Path, index: Index) -> CorpusDescription | None:
    file = add_suffix(prefix, ".json")
    if not file.exists():
        return None
    try:
        description = CorpusDescription.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ConfigError(f"{file} does not describe a corpus: {where}: {first['msg']}; prepare it anew") from None
    documents = len(index.boundaries) - 1
    if (description.tokens, description.documents) != (index.tokens, documents):
        raise ConfigError(
            f"{file} speaks of {description.tokens} tokens in {description.documents} documents, the index "
            f"{add_suffix(prefix, '.idx')} of {index.tokens} in {documents}: one of them is another corpus's"
        )
    return description


def check_tokenizer(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the corpus was prepared with another tokenizer; without a description nobody knows."""
    if corpus.description is None or corpus.description.tokenizer.sha256 == tokenizer.fingerprint:
        return
    theirs = corpus.description.tokenizer
    raise ConfigError(
        f"{_named(corpus)} was prepared with the tokenizer {theirs.name!r} (SHA-256 {theirs.sha256[:12]}...), which is "
        f"not {tokenizer.name!r} ({tokenizer.fingerprint[:12]}...): use that one, or prepare the corpus anew"
    )


def check_document_ends(corpus: Corpus, tokenizer: Tokenizer, masks: str) -> None:
    """Raise ConfigError if documents do not end with the token by which `masks`, named as in the configuration, find
    their ends.

    Up to DOCUMENTS_CHECKED documents are looked at, spread evenly. What `prepare` wrote needs no look.
    """
    if corpus.description or not corpus.documents:
        return
    numbers = np.unique(np.linspace(0, corpus.documents - 1, DOCUMENTS_CHECKED).astype(np.int64))
    # A document is as long as its sequences; one may be empty.
    starts = [corpus.index.first_token(sequence) for sequence in corpus.index.boundaries[numbers]]
    ends = [corpus.index.first_token(sequence) for sequence in corpus.index.boundaries[numbers + 1]]
    last_tokens = [int(corpus.tokens[end - 1]) for start, end in zip(starts, ends, strict=True) if end > start]
    wrong = Counter(last_tokens)
    del wrong[tokenizer.end_of_document]
    if wrong:
        raise ConfigError(
            f"{_named(corpus)}: {wrong.total()} of {len(last_tokens)} documents looked at do not end with the "
            f"end-of-document token {tokenizer.end_of_document} of '{tokenizer.name}' (most of them end with "
            f"{wrong.most_common(1)[0][0]}), by which {masks} finds documents: prepare the corpus with --append-eod "
            "and this tokenizer, make that token its eos_token, or set the key to true"
        )


def check_ids(corpus: Corpus, vocab_size: int) -> None:
    """Read all tokens, and raise ConfigError for an id that the vocabulary lacks."""
    checked = tokens_below(vocab_size, corpus)
    if isinstance(checked, CheckedTokens):
        for start in range(0, len(checked), SCAN_BLOCK_TOKENS):
            checked[start : start + SCAN_BLOCK_TOKENS]  # which checks them


def tokens_below(vocab_size: int, corpus: Corpus) -> NDArray[Any] | CheckedTokens:
    """Return a corpus's tokens, which are checked as they are read.

    They need no check if the description says that they come from a tokenizer with no more ids.
    """
    if corpus.description and corpus.description.tokenizer.vocab_size <= vocab_size:
        return corpus.tokens
    return CheckedTokens(corpus, vocab_size)


class CheckedTokens:
    """The tokens of a corpus as an array that can be sliced, which raises ConfigError for an id that is too large."""

    def __init__(self, corpus: Corpus, vocab_size: int) -> None:
        self._corpus = corpus
        self._vocab_size = vocab_size

    @property
    def stored(self) -> NDArray[Any]:
        """The tokens without the check."""
        return self._corpus.tokens

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        block = self.stored[part]
        # As unsigned numbers the negative ones are the largest, so one pass finds both kinds.
        unsigned = block.view(f"u{block.itemsize}")
        if len(block) and int(unsigned.max()) >= self._vocab_size:
            place = int(np.argmax(unsigned >= self._vocab_size))
            raise ConfigError(
                f"{_named(self._corpus)}: token {part.start + place} of {add_suffix(self._corpus.prefix, '.bin')} has "
                f"the id {int(block[place])}, the vocabulary has {self._vocab_size} (0 to {self._vocab_size - 1}): use "
                "the tokenizer that it was prepared with"
            )
        return block


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy in nats of how often each token occurs: the loss of the best model that ignores context."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
