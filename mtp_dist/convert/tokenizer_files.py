"""The files by which Hugging Face's libraries know a tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from mtp_dist.data.text_tokenizers import TOKENIZER_FILES, HuggingFaceTokenizer, tokenizer_file
from mtp_dist.data.tokenizer import ByteTokenizer, build_tokenizer
from mtp_dist.data.tokenizer import Tokenizer as OurTokenizer

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CONFIG = "tokenizer_config.json"
BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")
"""What may stand beside a tokenizer and belongs to it."""


def write_tokenizer(name: str, folder: Path) -> tuple[str, int]:
    """Write the tokenizer that `data.tokenizer` names. Returns the token that ends a document, and its id."""
    tokenizer = build_tokenizer(name)
    if isinstance(tokenizer, ByteTokenizer):
        library = byte_level_tokenizer()
        library.save(str(folder / "tokenizer.json"))
        end = END_OF_TEXT
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        file = tokenizer_file(name, f"data.tokenizer = {name!r}")
        copy_tokenizer(file, folder)
        end, settings = _end_and_class(tokenizer, file)
    given = folder / TOKENIZER_CONFIG
    if given.exists():
        settings |= json.loads(given.read_text(encoding="utf-8"))
    settings["eos_token"] = end
    given.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return end, tokenizer.end_of_document


def _end_and_class(tokenizer: OurTokenizer, file: Path) -> tuple[str, dict[str, Any]]:
    """The token that ends a document, and what tokenizer_config.json needs where there is none yet."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        end = tokenizer.backend.id_to_token(tokenizer.end_of_document)
        assert end is not None, "found by its text"
        return end, {"tokenizer_class": "PreTrainedTokenizerFast"}
    end = SentencePieceProcessor(model_file=str(file)).id_to_piece(tokenizer.end_of_document)
    return end, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "legacy": False}


def byte_level_tokenizer() -> Tokenizer:
    """One token a byte, by its value, and 256 for the end of a text."""
    # ByteLevel writes each byte as one character: its own where it is printable, else one from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    assert set(characters.values()) == set(ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return library


def find_tokenizer(folder: Path) -> Path | None:
    """The file of a folder's tokenizer, if it has one."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).exists()), None)


def copy_tokenizer(file: Path, folder: Path) -> None:
    """Copy a tokenizer and what is beside it."""
    shutil.copyfile(file, folder / f"tokenizer{file.suffix}")
    for name in BESIDE:
        if (file.parent / name).exists():
            shutil.copyfile(file.parent / name, folder / name)
