"""Hugging Face and SentencePiece tokenizers, read from their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray

from mtp_dist.data.sources.documents import Conversation
from mtp_dist.data.tokenizer import Ids, Tokenizer, mark_prompt
from mtp_dist.errors import ConfigError, DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>")
"""Common end-of-text tokens, tried in this order if the tokenizer's files do not name one."""


def tokenizer_file(name: str, label: str) -> Path:
    """Return a tokenizer's file. Raise ConfigError, starting with `label`, if there is none."""
    path = Path(name)
    if not path.exists():
        path = _cached_folder(name, label)
    if path.is_dir():
        found = [path / file for file in TOKENIZER_FILES if (path / file).exists()]
        if not found:
            raise ConfigError(f"{label} is a folder without {' or '.join(TOKENIZER_FILES)}: name a folder that has one")
        return found[0]
    if path.suffix not in (".json", ".model"):
        raise ConfigError(f"{label} is neither a tokenizer.json nor a SentencePiece .model file: name one of these")
    return path


def _cached_folder(name: str, label: str) -> Path:
    unknown = f"{label} is unknown: it is not 'bytes', and there is no file or folder with this path"
    if Path(name).suffix in (".json", ".model") or name.startswith("~"):
        raise ConfigError(unknown)
    # Local files only: compute nodes are often offline, and every rank would query the hub at once.
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise ConfigError(unknown) from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{unknown}, and it is not in this machine's Hugging Face cache: if it is a Hugging Face name, run `hf "
            f"download {name}` first"
        ) from None


def decode_utf8(documents: Sequence[bytes]) -> list[str]:
    """Decode documents. Raise DataError with the byte's offset for invalid UTF-8."""
    texts = []
    for number, document in enumerate(documents):
        try:
            texts.append(document.decode())
        except UnicodeDecodeError as error:
            which = f" of document {number}" if len(documents) > 1 else ""
            raise DataError(f"invalid UTF-8 at byte {error.start}{which}") from None
    return texts


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`; the files next to it may name its end-of-text token."""

    accepts_raw_bytes = False

    def __init__(self, name: str, file: Path, label: str) -> None:
        """Read `file`. Raise DataError, starting with `label`, if it cannot be used."""
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{label}: {file} is not a valid tokenizer ({error}): name another") from None
        self._set_up()
        self.name = name
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = self._find_end(file.parent, label)

    def _set_up(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()
        # A special token spelled out in a document, such as a tokenizer's own source, is text and must not split it.
        self.backend.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()  # the library does not pickle all of these settings

    def _find_end(self, folder: Path, label: str) -> int:
        for token in _configured_end(folder, label):
            if self.backend.token_to_id(token) is None:
                raise DataError(
                    f"{label} has no token {token!r}, which the files next to it name as eos_token: fix them"
                )
        for token in [*_configured_end(folder, label), *END_TOKENS]:
            if (found := self.backend.token_to_id(token)) is not None:
                return found
        raise DataError(
            f"{label} has no end-of-text token: add an eos_token to {folder / 'tokenizer_config.json'}; without one, "
            f"these are tried: {', '.join(END_TOKENS)}"
        )

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        texts = decode_utf8(documents)
        with self._naming_unknown_text():
            encodings = self.encode_texts(texts)
        return [np.fromiter(encoding.ids, self.dtype, len(encoding)) for encoding in encodings]

    def encode_texts(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """Call the library, which takes nearly all of the time."""
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[Ids]:
        parts = [decode_utf8(conversation.parts) for conversation in conversations]
        with self._naming_unknown_text():
            encodings = self._conversation_backend.encode_batch(
                ["".join(each) for each in parts], add_special_tokens=False
            )
        return [self._marked(encoding, each) for encoding, each in zip(encodings, parts, strict=True)]

    @cached_property
    def _conversation_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but one that recognizes special tokens, which a chat template writes."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def _marked(self, encoding: tokenizers.Encoding, parts: Sequence[str]) -> Ids:
        """Return the ids of prompts and completions in turn. A token with a character of a completion is learned."""
        ids = np.array(encoding.ids, dtype=np.int32)
        starts, ends = np.array(encoding.offsets).reshape(-1, 2).T
        bounds = list(accumulate(map(len, parts), initial=0))
        learned = np.zeros(len(ids), dtype=bool)
        for start, end in zip(bounds[1::2], bounds[2::2], strict=False):
            learned |= (starts < end) & (ends > start)
        ids = np.where(learned, ids, mark_prompt(ids))
        return ids[:-1] if len(ids) and ids[-1] == self.end_of_document else ids

    @contextmanager
    def _naming_unknown_text(self) -> Iterator[None]:
        """Turn the library's errors into DataError."""
        try:
            yield
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"{self.name!r} has no token for a part of this text ({error}): use a tokenizer with an unknown token, "
                "or better a byte-level one, which can encode everything"
            ) from None

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        return self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def decode_with_special_tokens(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        return self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parts of its JSON that decide the ids; the file's name and layout do not count."""
        parts = json.loads(self.backend.to_str())
        used = [parts[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        return hashlib.sha256(json.dumps([*used, self.end_of_document], sort_keys=True).encode()).hexdigest()


def _configured_end(folder: Path, label: str) -> Iterable[str]:
    """Yield each eos_token that the files next to a tokenizer.json name."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if file.exists():
            try:
                token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError, RecursionError) as error:
                raise DataError(f"{label}: {file} is not a JSON object ({error}): fix or remove it") from None
            content = token.get("content") if isinstance(token, dict) else token
            if content is not None and not isinstance(content, str):
                raise DataError(f"{label}: {file} names an eos_token that is not text: fix it")
            if content:
                yield content


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of a SentencePiece `.model`."""

    accepts_raw_bytes = False

    def __init__(self, name: str, file: Path, label: str) -> None:
        """Read `file`. Raise DataError, starting with `label`, if it cannot be used."""
        try:
            self._model = file.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{label}: {file} is not a valid tokenizer ({error}): name another") from None
        self.name = name
        self.vocab_size = self._processor.vocab_size()
        self.end_of_document = self._find_end(label)

    def _find_end(self, label: str) -> int:
        if (end := self._processor.eos_id()) >= 0:
            return end
        for token in END_TOKENS:
            if (found := self._processor.piece_to_id(token)) != self._processor.unk_id():
                return found
        raise DataError(
            f"{label} has no end-of-text token: train it with --eos_id, or use another; without one, these are tried: "
            f"{', '.join(END_TOKENS)}"
        )

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        # One thread: the processes of `prepare` already take all cores.
        all_ids = self._processor.encode(decode_utf8(documents), num_threads=1)
        return [np.fromiter(ids, self.dtype, len(ids)) for ids in all_ids]

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        array = np.asarray(ids, dtype=np.int64)
        return self._processor.decode(array[array < self.vocab_size].tolist())

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._model + f" {self.end_of_document}".encode()).hexdigest()
