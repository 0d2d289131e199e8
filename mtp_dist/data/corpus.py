"""A prepared corpus: PREFIX.bin and PREFIX.idx in Megatron-core's format, and its metadata in PREFIX.json."""

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
from mtp_dist.data.indexed import Index, read_index
from mtp_dist.data.sources.work_units import InvalidUtf8
from mtp_dist.data.text_loss import TextLoss
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import DataError, UserError
from mtp_dist.fs import add_suffix

SCAN_BLOCK_TOKENS = 1 << 24
DOCUMENTS_CHECKED = 1000


class TokenizerDescription(Section):
    """The tokenizer that a corpus was prepared with."""

    name: str
    sha256: str
    """Fingerprint of the tokenizer."""
    vocab_size: PositiveInt
    end_of_document: NonNegativeInt


class SourceDescription(Section):
    """The inputs and options that `mtp-dist prepare` was called with."""

    inputs: tuple[str, ...]
    field: str
    """Field with the text, with the completions if there is a field with prompts, or with messages."""
    prompt_field: str | None = None
    chat_template: str | None = None
    """The template that wrote the messages."""
    glob: str | None
    subset: str | None
    split: str | None
    invalid_utf8: InvalidUtf8


class CorpusDescription(Section):
    """Metadata stored in PREFIX.json."""

    format: Literal[1] = 1
    tokenizer: TokenizerDescription
    documents: NonNegativeInt
    tokens: NonNegativeInt
    """Number of tokens including end-of-document tokens."""
    prompt_tokens: NonNegativeInt = 0
    """Tokens of prompts, whose ids are stored as their bitwise complement: they are targets of no head."""
    bytes: NonNegativeInt
    """Bytes of text of these documents."""
    empty_documents: NonNegativeInt
    """Documents left out because they have no tokens."""
    empty_bytes: NonNegativeInt = 0
    """Bytes of text of these."""
    checked_bytes: NonNegativeInt = 0
    """Bytes of text that were encoded and decoded again; 0 if older versions or byte tokenizers did not check."""
    lost_bytes: NonNegativeInt = 0
    """Checked bytes that did not survive decoding."""
    lost_whitespace: NonNegativeInt = 0
    """Lost bytes that are whitespace."""
    replaced_documents: NonNegativeInt
    """Documents with invalid UTF-8 replaced by U+FFFD."""
    skipped_documents: NonNegativeInt
    """Documents left out for invalid UTF-8."""
    source: SourceDescription
    sha256: str
    """SHA-256 of PREFIX.bin."""


@dataclass(frozen=True)
class Corpus:
    """An opened corpus; its tokens stay on disk."""

    prefix: Path
    key: str
    """Configuration key or option that names it, such as `data.train.0.path`."""
    tokens: NDArray[Any]
    """All tokens, memory-mapped."""
    index: Index
    description: CorpusDescription | None
    """None if there is no PREFIX.json, as in corpora of Megatron-LM's own tools."""

    @property
    def documents(self) -> int:
        return len(self.index.boundaries) - 1

    @cached_property
    def document_lengths(self) -> NDArray[Any]:
        """Tokens per document; memory-mapped if every document is one sequence, as `prepare` writes them."""
        lengths, boundaries = self.index.lengths, self.index.boundaries
        if len(lengths) == self.documents:
            return lengths
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return np.diff(ends[boundaries])

    @property
    def num_bytes(self) -> int | None:
        """Bytes of text, if known."""
        return self.description.bytes if self.description else None

    @property
    def has_prompts(self) -> bool:
        return self.description is not None and self.description.prompt_tokens > 0

    @property
    def has_conversations(self) -> bool:
        return self.description is not None and self.description.source.chat_template is not None

    @property
    def text_loss(self) -> TextLoss:
        """Measured loss of text in encoding and decoding."""
        known = self.description
        return TextLoss(known.checked_bytes, known.lost_bytes, known.lost_whitespace) if known else TextLoss()

    @property
    def bytes_with_tokens(self) -> int | None:
        """Bytes of text that tokens represent, if known."""
        known = self.description
        if known is None or not known.lost_bytes:
            return self.num_bytes
        return self.text_loss.surviving(known.bytes + known.empty_bytes)

    def verify(self) -> None:
        """Read all of PREFIX.bin. Raise DataError if it has changed, or if no metadata file lists its hash."""
        file = add_suffix(self.prefix, ".bin")
        if self.description is None:
            raise DataError(f"{_label(self)}: no {self.prefix.name}.json lists the hash of {file}: prepare it again")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.description.sha256:
            raise DataError(
                f"{_label(self)}: {file} has the SHA-256 {found}, it was written with {self.description.sha256}: it "
                "has changed, copy or prepare it again"
            )


def _label(corpus: Corpus) -> str:
    return f"{corpus.key} = '{corpus.prefix}'"


def corpus_prefix(path: str | Path) -> Path | None:
    """Return the prefix of a corpus from the prefix or one of its files; None if the path is neither."""
    path = Path(path)
    if path.suffix in (".bin", ".idx") or (path.suffix == ".json" and path.with_suffix(".idx").exists()):
        return path.with_suffix("")
    return path if any(add_suffix(path, suffix).exists() for suffix in (".bin", ".idx")) else None


def open_corpus(prefix: str | Path, key: str) -> Corpus:
    """Open and check a corpus without reading its tokens. Raise DataError, starting with `key`, if it is damaged."""
    prefix = Path(prefix)
    try:
        for suffix in (".bin", ".idx"):
            if not add_suffix(prefix, suffix).exists():
                raise DataError(f"{add_suffix(prefix, suffix)} is missing: name another path, or copy the corpus again")
        index = read_index(add_suffix(prefix, ".idx"))
        return Corpus(prefix, key, _map_tokens(prefix, index), index, _read_description(prefix, index))
    except UserError as error:
        raise DataError(f"{key} = '{prefix}': {error}") from None
    except OSError as error:
        raise DataError(f"{key} = '{prefix}': cannot read {error.filename} ({error.strerror})") from None


def _map_tokens(prefix: Path, index: Index) -> NDArray[Any]:
    file = add_suffix(prefix, ".bin")
    expected = index.tokens * index.dtype.itemsize
    if (size := file.stat().st_size) != expected:
        raise DataError(
            f"{file} has {size} bytes, its index {add_suffix(prefix, '.idx')} lists {index.tokens} tokens of "
            f"{index.dtype.itemsize} bytes = {expected}: it is truncated or of another corpus, copy or prepare it again"
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
        field = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{file} does not describe a corpus: {field}: {first['msg']}; prepare it again") from None
    documents = len(index.boundaries) - 1
    if (description.tokens, description.documents) != (index.tokens, documents):
        raise DataError(
            f"{file} lists {description.tokens} tokens in {description.documents} documents, the index "
            f"{add_suffix(prefix, '.idx')} lists {index.tokens} in {documents}: they are of different corpora, copy or "
            "prepare them again"
        )
    return description


def check_tokenizer(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Raise DataError if the corpus was prepared with another tokenizer, as far as its metadata shows."""
    if corpus.description is None or corpus.description.tokenizer.sha256 == tokenizer.fingerprint:
        return
    used = corpus.description.tokenizer
    raise DataError(
        f"{_label(corpus)} was prepared with the tokenizer {used.name!r} (SHA-256 {used.sha256[:12]}...), which is "
        f"not {tokenizer.name!r} ({tokenizer.fingerprint[:12]}...): use that one, or prepare the corpus again"
    )


def check_document_ends(corpus: Corpus, tokenizer: Tokenizer, masks: str) -> None:
    """Raise DataError if documents do not end with the token that `masks`, as named in the configuration, rely on.

    Check up to DOCUMENTS_CHECKED documents, evenly spaced. A corpus with metadata needs no check.
    """
    if corpus.description or not corpus.documents:
        return
    numbers = np.unique(np.linspace(0, corpus.documents - 1, DOCUMENTS_CHECKED).astype(np.int64))
    # A document may have several sequences, or an empty one.
    starts = [corpus.index.first_token(sequence) for sequence in corpus.index.boundaries[numbers]]
    ends = [corpus.index.first_token(sequence) for sequence in corpus.index.boundaries[numbers + 1]]
    last_tokens = [int(corpus.tokens[end - 1]) for start, end in zip(starts, ends, strict=True) if end > start]
    wrong = Counter(last_tokens)
    del wrong[tokenizer.end_of_document]
    if wrong:
        raise DataError(
            f"{_label(corpus)}: {wrong.total()} of {len(last_tokens)} checked documents do not end with the "
            f"end-of-document token {tokenizer.end_of_document} of '{tokenizer.name}' (most of them end with "
            f"{wrong.most_common(1)[0][0]}), which {masks} requires: prepare the corpus with --append-eod and this "
            "tokenizer, make that token its eos_token, or set the key to true"
        )


def check_ids(corpus: Corpus, vocab_size: int) -> None:
    """Read all tokens. Raise DataError for an id outside the vocabulary."""
    checked = tokens_below(vocab_size, corpus)
    if isinstance(checked, CheckedTokens):
        for start in range(0, len(checked), SCAN_BLOCK_TOKENS):
            checked[start : start + SCAN_BLOCK_TOKENS]  # which checks them


def tokens_below(vocab_size: int, corpus: Corpus) -> NDArray[Any] | CheckedTokens:
    """Return a corpus's tokens. Check ids as they are read, unless the tokenizer of its metadata has no larger ones."""
    if corpus.description and corpus.description.tokenizer.vocab_size <= vocab_size:
        return corpus.tokens
    return CheckedTokens(corpus, vocab_size)


class CheckedTokens:
    """The tokens of a corpus as an array that can be sliced; slicing raises DataError for an id that is too large."""

    def __init__(self, corpus: Corpus, vocab_size: int) -> None:
        self._corpus = corpus
        self._vocab_size = vocab_size

    @property
    def stored(self) -> NDArray[Any]:
        """Tokens without the check."""
        return self._corpus.tokens

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, part: slice) -> NDArray[Any]:
        block = self.stored[part]
        # Viewed as unsigned, negative ids are the largest: one pass finds both kinds.
        unsigned = block.view(f"u{block.itemsize}")
        if len(block) and int(unsigned.max()) >= self._vocab_size:
            index = int(np.argmax(unsigned >= self._vocab_size))
            raise DataError(
                f"{_label(self._corpus)}: token {part.start + index} of {add_suffix(self._corpus.prefix, '.bin')} has "
                f"the id {int(block[index])}, the vocabulary has {self._vocab_size} (0 to {self._vocab_size - 1}): use "
                "the tokenizer that the corpus was prepared with"
            )
        return block


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy in nats of how often each token occurs: the loss of the best model that ignores context."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
