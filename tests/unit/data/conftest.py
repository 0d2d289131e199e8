import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

SENTENCES = [f"def f{i}(x): return x * {i} + y{i % 7}\n" for i in range(200)]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The package's log from INFO on."""
    caplog.set_level("INFO", "mtp_dist")
    return caplog


@pytest.fixture(scope="session")
def trained_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json, tokenizer.model, and endless.model, which has no end-of-text token."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_byte_pairs().save(str(folder / "tokenizer.json"))
    for name, eos in (("tokenizer", 2), ("endless", -1)):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=model,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            eos_id=eos,
            minloglevel=2,
        )
        (folder / f"{name}.model").write_bytes(model.getvalue())
    return folder


def train_byte_pairs() -> tokenizers.Tokenizer:
    """300 tokens and three special ones, with everything else that such a file may request."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<s>", "<stop>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A <s>", special_tokens=[("<s>", 301)])
    tokenizer.enable_truncation(20)
    tokenizer.enable_padding(length=30)
    return tokenizer
