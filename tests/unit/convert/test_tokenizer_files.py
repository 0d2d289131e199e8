"""transformers reads texts as the training did."""

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from mtp_dist.convert.tokenizer_files import byte_level_tokenizer, write_tokenizer
from mtp_dist.data.tokenizer import build_tokenizer

TEXT = "def f(x):\n\treturn  x * 2\n\nNaïve café, 東京 and 😀.\n"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_are_their_own_ids(text: str) -> None:
    library = byte_level_tokenizer()
    ids = library.encode(text).ids
    assert ids == list(text.encode())
    assert library.decode(ids) == text


def test_bytes_through_transformers(tmp_path: Path) -> None:
    assert write_tokenizer("bytes", tmp_path) == ("<|endoftext|>", 256)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.is_fast and len(tokenizer) == 257
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 256)
    assert tokenizer(TEXT).input_ids == list(TEXT.encode())
    assert tokenizer.decode([*TEXT.encode(), 256], skip_special_tokens=True) == TEXT
    assert sorted(tokenizer.get_vocab().values()) == list(range(257))
    # What a text may spell out in training is an end for transformers, as with every tokenizer there.
    assert tokenizer("<|endoftext|>a").input_ids == [256, 97]


def byte_pairs(folder: Path) -> Path:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [TEXT] * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("beside", [{}, {"model_max_length": 99, "eos_token": "<eos>"}])
def test_a_tokenizer_json_is_copied_with_its_end(tmp_path: Path, beside: dict[str, object]) -> None:
    file = byte_pairs(tmp_path / "trained")
    if beside:
        (file.parent / "tokenizer_config.json").write_text(json.dumps(beside))
    (tmp_path / "out").mkdir()
    assert write_tokenizer(str(file), tmp_path / "out") == ("<eos>", 0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == file.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<eos>", 0)
    assert tokenizer(TEXT).input_ids == build_tokenizer(str(file)).encode(TEXT).tolist()
    assert not beside or tokenizer.model_max_length == 99


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_is_copied_with_its_end(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text").write_text(TEXT * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=285,
        model_type=kind,
        byte_fallback=True,
        minloglevel=2,
    )
    (tmp_path / "out").mkdir()
    name = str(tmp_path / "tokenizer.model")
    assert write_tokenizer(name, tmp_path / "out") == ("</s>", 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id == 2
    assert tokenizer("return x and café").input_ids == build_tokenizer(name).encode("return x and café").tolist()
