"""transformers encodes texts as the training did."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mtp_dist.convert.tokenizer_files import SAMPLE_TEXTS, byte_level_tokenizer, write_tokenizer
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.errors import DataError
from tests.unit.convert.folders import TEXT, byte_pairs, train_sentencepiece

TEXTS = [*SAMPLE_TEXTS, TEXT, " one space before", "one after ", "return x and café", " "]


def export(name: str, folder: Path, end: tuple[str, int]) -> PreTrainedTokenizerBase:
    """Return an exported tokenizer, after a check that it ends texts and gives ids as in training."""
    folder.mkdir()
    assert write_tokenizer(name, folder) == end
    training, exported = build_tokenizer(name), AutoTokenizer.from_pretrained(folder)
    assert (exported.eos_token, exported.eos_token_id) == end
    for text in TEXTS:
        assert exported(text).input_ids == training.encode(text).tolist(), repr(text)
    return exported


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_are_their_own_ids(text: str) -> None:
    library = byte_level_tokenizer()
    ids = library.encode(text).ids
    assert ids == list(text.encode())
    assert library.decode(ids) == text


def test_bytes_through_transformers(tmp_path: Path) -> None:
    tokenizer = export("bytes", tmp_path / "out", ("<|endoftext|>", 256))
    assert tokenizer(TEXT).input_ids == list(TEXT.encode())
    assert tokenizer.decode([*TEXT.encode(), 256], skip_special_tokens=True) == TEXT
    assert tokenizer.is_fast and sorted(tokenizer.get_vocab().values()) == list(range(257))
    # transformers encodes it as the end of a text, as with every tokenizer; training encodes its bytes.
    assert tokenizer("<|endoftext|>a").input_ids == [256, 97]


def test_tokenizer_json_is_copied(tmp_path: Path) -> None:
    file = byte_pairs(tmp_path / "trained", "<eos>")
    export(str(file), tmp_path / "out", ("<eos>", 0))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == file.read_bytes()


NORMALIZATIONS: dict[str, dict[str, object]] = {
    "default": {},
    "identity": {"normalization_rule_name": "identity"},
    "spaces kept": {"remove_extra_whitespaces": False},
    "no prefix": {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "without bytes": {"byte_fallback": False},
    "symbols": {"user_defined_symbols": ["def", "<sep>"], "pad_id": 3},
}


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_gives_the_ids_of_the_training(tmp_path: Path, kind: str, normalization: str) -> None:
    name = str(train_sentencepiece(tmp_path, TEXT + "\n".join(TEXTS), model_type=kind, **NORMALIZATIONS[normalization]))
    tokenizer = export(name, tmp_path / "out", ("</s>", 2))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == Path(name).read_bytes()
    assert tokenizer.pad_token == ("<pad>" if normalization == "symbols" else "</s>")


TEMPLATE = processors.TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", 0)])
SEQUENCE = processors.Sequence([processors.ByteLevel(trim_offsets=False), TEMPLATE])


@pytest.mark.parametrize("processor", [TEMPLATE, SEQUENCE, None], ids=["template", "sequence", "none"])
def test_no_token_is_added_or_truncated(tmp_path: Path, processor: processors.PostProcessor | None) -> None:
    """Training applies no post-processor, truncation, padding or other file next to the tokenizer."""
    file = byte_pairs(tmp_path / "trained", "<eos>")
    library = Tokenizer.from_file(str(file))
    library.enable_truncation(7)
    library.enable_padding(length=9)
    if processor:
        library.post_processor = processor
    library.save(str(file))
    settings = {"eos_token": "<eos>", "bos_token": "<s>", "pad_token": "[PAD]", "model_max_length": 99}
    settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True, "legacy": True}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    (file.parent / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    tokenizer = export(str(file), tmp_path / "out", ("<eos>", 0))
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<eos>", "<eos>")
    assert len(tokenizer) == library.get_vocab_size(), "no token is new"
    assert (tokenizer.model_max_length, tokenizer.chat_template) == (99, "{{ messages }}")


def test_tokenizer_with_other_ids_in_transformers_is_refused(tmp_path: Path) -> None:
    options = {"model_type": "bpe", "treat_whitespace_as_suffix": True}
    name = str(train_sentencepiece(tmp_path, TEXT + "\n".join(TEXTS), **options))
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=rf"^data\.tokenizer = '{name}' cannot be exported: for .* AutoTokenizer would"):
        write_tokenizer(name, tmp_path / "out")
