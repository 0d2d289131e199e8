"""Tokenizers of other people, which read text: Hugging Face's and SentencePiece's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray

from mtp_dist.data.tokenizer import Ids, Tokenizer
from mtp_dist.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>")
"""Looked for, in this order, where a tokenizer does not say which of its tokens ends a text."""


def tokenizer_file(name: str, named: str) -> Path:
    """The file behind a tokenizer's name. Raises ConfigError, which begins with `named`."""
    path = Path(name)
    if not path.exists():
        path = _cached_folder(name, named)
    if path.is_dir():
        found = [path / file for file in TOKENIZER_FILES if (path / file).exists()]
        if not found:
            raise ConfigError(f"{named} is a folder without {' or '.join(TOKENIZER_FILES)}: give one that has it")
        return found[0]
    if path.suffix not in (".json", ".model"):
        raise ConfigError(f"{named} is neither a tokenizer.json nor a SentencePiece .model file: give one of these")
    return path


def _cached_folder(name: str, named: str) -> Path:
    unknown = f"{named} is not known: it is not 'bytes', and no file or folder has this path"
    if Path(name).suffix in (".json", ".model") or name.startswith("~"):
        raise ConfigError(unknown)
    # Only what is on this machine: compute nodes are offline, and all ranks would ask at once.
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise ConfigError(unknown) from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{unknown}; the Hugging Face cache of this machine does not have it either: if it is a Hugging Face name, "
            f"run `hf download {name}` first"
        ) from None


def decode_utf8(documents: Sequence[bytes]) -> list[str]:
    """The documents as text. Raises ConfigError, with the byte's offset, for invalid UTF-8."""
    texts = []
    for number, document in enumerate(documents):
        try:
            texts.append(document.decode())
        except UnicodeDecodeError as error:
            where = f" of document {number}" if len(documents) > 1 else ""
            raise ConfigError(f"invalid UTF-8 at byte {error.start}{where}") from None
    return texts


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, with the end of a text as the files beside it tell."""

    accepts_raw_bytes = False

    def __init__(self, name: str, file: Path, named: str) -> None:
        """Raises ConfigError, which begins with `named`."""
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"{named}: {file} is no tokenizer that can be read ({error}): give another") from None
        self._set_up()
        self.name = name
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = self._find_end(file.parent, named)

    def _set_up(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()
        # A document that spells a special token out, such as a tokenizer's own source, must not be cut in two by it.
        self.backend.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()  # which the library's pickle forgets in part

    def _find_end(self, folder: Path, named: str) -> int:
        for token in _configured_end(folder, named):
            if self.backend.token_to_id(token) is None:
                raise ConfigError(f"{named} has no token {token!r}, which the files beside it name as its eos_token")
        for token in [*_configured_end(folder, named), *END_TOKENS]:
            if (found := self.backend.token_to_id(token)) is not None:
                return found
        raise ConfigError(
            f"{named} has no end-of-text token: add an eos_token to {folder / 'tokenizer_config.json'}; without one "
            f"it is looked for among {', '.join(END_TOKENS)}"
        )

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        texts = decode_utf8(documents)
        try:
            encodings = self.encode_texts(texts)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(
                f"{self.name!r} has no token for a part of this text ({error}): use a tokenizer with an unknown token, "
                "or better one of bytes, which has a token for everything"
            ) from None
        return [np.fromiter(encoding.ids, self.dtype, len(encoding)) for encoding in encodings]

    def encode_texts(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """The library's own call, which takes nearly all of the time."""
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        return self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    @cached_property
    def fingerprint(self) -> str:
        """Of the parts of its JSON that matter, so that the file's name and layout do not count."""
        parts = json.loads(self.backend.to_str())
        used = [parts[part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        return hashlib.sha256(json.dumps([*used, self.end_of_document], sort_keys=True).encode()).hexdigest()


def _configured_end(folder: Path, named: str) -> Iterable[str]:
    """The eos_token that the files beside a tokenizer.json name, if any."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if file.exists():
            try:
                token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError, RecursionError) as error:
                raise ConfigError(f"{named}: {file} is not a JSON object ({error}): fix or remove it") from None
            content = token.get("content") if isinstance(token, dict) else token
            if content is not None and not isinstance(content, str):
                raise ConfigError(f"{named}: {file} names an eos_token that is no text: mend it")
            if content:
                yield content


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`."""

    accepts_raw_bytes = False

    def __init__(self, name: str, file: Path, named: str) -> None:
        """Raises ConfigError, which begins with `named`."""
        try:
            self._model = file.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{named}: {file} is no tokenizer that can be read ({error}): give another") from None
        self.name = name
        self.vocab_size = self._processor.vocab_size()
        self.end_of_document = self._find_end(named)

    def _find_end(self, named: str) -> int:
        if (end := self._processor.eos_id()) >= 0:
            return end
        for token in END_TOKENS:
            if (found := self._processor.piece_to_id(token)) != self._processor.unk_id():
                return found
        raise ConfigError(
            f"{named} has no end-of-text token: train it with --eos_id, or use another; without one it is looked for "
            f"among {', '.join(END_TOKENS)}"
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
