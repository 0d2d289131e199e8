"""The files from which Hugging Face's libraries load a tokenizer."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from mtp_dist.convert.json_file import read_json_object
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.convert.sentencepiece_model import convert_sentencepiece
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.text_tokenizers import TOKENIZER_FILES, SentencePieceTokenizer, tokenizer_file
from mtp_dist.data.tokenizer import ByteTokenizer
from mtp_dist.data.tokenizer import Tokenizer as TrainingTokenizer
from mtp_dist.data.word_tokenizer import WordTokenizer
from mtp_dist.errors import DataError, UserError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_JSON, TOKENIZER_MODEL, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
COMPANION_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE, GENERATION_CONFIG)
"""Files next to a tokenizer that belong to it."""
SAMPLE_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs; it's 3.14 times faster, isn't it?",
    "  two spaces before,  two  between, and two after  ",
    "First line.\nSecond line.\n\n\tThird line, indented.\n",
    "Windows\r\nends lines\r\nlike this.\r\n",
    "def area(r: float) -> float:\n    if r < 0:\n        raise ValueError(f'{r=}')\n    return 3.14 * r ** 2\n",
    '{"key": [1, 2, 3], "a/b": "C:\\\\path", "x_y": null}\n',
    "Größere Übung, naïve café, e\u0301tude, ½ ﬁne, no\u00a0break, \uff21\uff22\uff23.",
    "日本語の文章です。中文没有空格。 한국어 문장. Русский текст. नमस्ते दुनिया. مرحبا بالعالم.",
    "👍🏽 👩\u200d💻 🇩🇪 ❤\ufe0f",
    "x",
    "\n",
    "",
)
"""Texts for which an exported tokenizer must give the ids used in training."""


def write_tokenizer(name: str, folder: Path) -> tuple[str, int]:
    """Write the tokenizer that `data.tokenizer` names. Return the token that ends a document, and its id.

    As in training, no special tokens are added to a text. Raise DataError if transformers gives other ids.
    """
    tokenizer = build_tokenizer(name)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(tokenizer, ByteTokenizer):
        library = byte_level_tokenizer()
    elif isinstance(tokenizer, WordTokenizer):
        library = word_level_tokenizer(tokenizer.words)
    else:
        file = tokenizer_file(name, f"data.tokenizer = {name!r}")
        if isinstance(tokenizer, SentencePieceTokenizer):
            shutil.copyfile(file, folder / TOKENIZER_MODEL)
            library, model_settings = convert_sentencepiece(file)
            settings |= model_settings
        else:
            library = Tokenizer.from_file(str(file))
            settings |= _kept_settings(file.parent, library)
        if (file.parent / CHAT_TEMPLATE).exists():
            shutil.copyfile(file.parent / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    library.no_truncation()
    library.no_padding()
    library.post_processor = None
    library.save(str(folder / TOKENIZER_JSON))
    end = library.id_to_token(tokenizer.end_of_document)
    assert end is not None, "a token of this tokenizer"
    settings = {"pad_token": end, "bos_token": end} | settings | {"eos_token": end}
    settings |= {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    settings |= {"model_input_names": ["input_ids", "attention_mask"], "padding_side": "left"}
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
    _verify(tokenizer, folder)
    return end, tokenizer.end_of_document


def _kept_settings(folder: Path, library: Tokenizer) -> dict[str, Any]:
    """Return the keys of a tokenizer_config.json that neither change the ids of a text nor add a token."""
    path = folder / TOKENIZER_CONFIG
    given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept: dict[str, Any] = {key: given[key] for key in ("model_max_length", "chat_template") if key in given}
    file = folder / CHAT_TEMPLATE
    template = file.read_text(encoding="utf-8") if file.exists() else str(given.get("chat_template"))
    # Elsewhere BOS is the token that ends a document: it also stands before each of them.
    for key in ("pad_token", "unk_token", *(["bos_token"] if "bos_token" in template else [])):
        token = given.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and library.token_to_id(content) is not None:
            kept[key] = content
    return kept


def generation_settings(name: str, end_of_document: int) -> dict[str, Any]:
    """Return the content of generation_config.json: that next to the tokenizer, if there is one, with its tokens.

    name: `data.tokenizer`. The token that ends a document ends a generated text too. What transformers derived from
    config.json, not from a file of the model's author, is not kept.
    """
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_document)
    file = Path(name) / GENERATION_CONFIG
    given = read_json_object(file, f"data.tokenizer = '{name}'") if file.exists() else {}
    if not given or given.get("_from_model_config"):
        return dict(tokens)
    ends = given.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = list(dict.fromkeys([*ends, end_of_document]))
    return tokens | given | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def _verify(tokenizer: TrainingTokenizer, folder: Path) -> None:
    """Raise DataError if transformers gives a text other ids than those used in training."""
    from transformers import AutoTokenizer

    try:
        exported = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what transformers raises has no common class
        raise DataError(
            f"data.tokenizer = '{tokenizer.name}' cannot be exported: AutoTokenizer does not open it ({error})"
        ) from None
    for text in SAMPLE_TEXTS:
        try:
            expected = tokenizer.encode(text).tolist()
        except UserError:  # a text that training would have rejected
            continue
        if (ids := exported(text).input_ids) != expected:
            raise DataError(
                f"data.tokenizer = '{tokenizer.name}' cannot be exported: for {text!r} AutoTokenizer would give "
                f"{len(ids)} ids, first {ids[:8]}, training used {len(expected)}, first {expected[:8]}"
            )


def byte_level_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, whose id is its value, and 256 for the end of a text."""
    # ByteLevel writes each byte as one character: its own if it is printable, else one from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    assert set(characters.values()) == set(ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return library


def word_level_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer with one token per word, whose id is its place, and the next one for the end of a text."""
    library = Tokenizer(models.WordLevel(vocab={word: number for number, word in enumerate(words)}))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return library


def find_tokenizer(folder: Path) -> Path | None:
    """Return the file of a folder's tokenizer, or None; in an export of mtp_dist the one used in training."""
    names = TOKENIZER_FILES[::-1] if (folder / HEADS_CONFIG).exists() else TOKENIZER_FILES
    return next((folder / name for name in names if (folder / name).exists()), None)


def copy_tokenizer(file: Path, folder: Path) -> None:
    """Copy a tokenizer and the files next to it that belong to it."""
    shutil.copyfile(file, folder / f"tokenizer{file.suffix}")
    for name in COMPANION_FILES:
        if (file.parent / name).exists():
            shutil.copyfile(file.parent / name, folder / name)
