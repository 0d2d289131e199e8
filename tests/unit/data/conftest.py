from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers

from tests.unit.data.preparing import train_sentencepiece

SENTENCES = [f"def f{i}(x): return x * {i} + y{i % 7}\n" for i in range(200)]


@pytest.fixture(scope="session")
def trained_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json, tokenizer.model, and endless.model, which has no end-of-text token."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_byte_pairs().save(str(folder / "tokenizer.json"))
    options = {"vocab_size": 400, "byte_fallback": True, "character_coverage": 1.0, "add_dummy_prefix": False}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    for name, eos in (("tokenizer", 2), ("endless", -1)):
        train_sentencepiece(folder / f"{name}.model", SENTENCES, eos_id=eos, **options)
    return folder


def train_byte_pairs(sentences: Sequence[str] = SENTENCES) -> tokenizers.Tokenizer:
    """300 tokens and three special ones, with everything else that such a file may request."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<s>", "<stop>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A <s>", special_tokens=[("<s>", 301)])
    tokenizer.enable_truncation(20)
    tokenizer.enable_padding(length=30)
    return tokenizer
