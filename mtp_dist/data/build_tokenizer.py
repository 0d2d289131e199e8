"""Choice of the tokenizer that a name stands for."""

from pathlib import Path

from mtp_dist.config.synthetic import SYNTHETIC_PREFIX
from mtp_dist.data.synthetic.tasks import task_kind
from mtp_dist.data.tokenizer import ByteTokenizer, Tokenizer
from mtp_dist.data.word_tokenizer import WordTokenizer


def build_tokenizer(name: str, key: str = "data.tokenizer") -> Tokenizer:
    """Build the tokenizer that `key` names. Download nothing.

    A name is `bytes`, a synthetic task, a `tokenizer.json` or SentencePiece `.model` file, a folder with one, or a
    model in the Hugging Face cache. Raise ConfigError if there is no such tokenizer, DataError if its files cannot be
    used.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name.startswith(SYNTHETIC_PREFIX) and not Path(name).exists():
        return WordTokenizer(task_kind(name, f"{key} = {name!r}"))
    # Its libraries take seconds to import, which a run on bytes does not need.
    from mtp_dist.data.text_tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, tokenizer_file

    label = f"{key} = {name!r}"
    file = tokenizer_file(name, label)
    kind = SentencePieceTokenizer if file.suffix == ".model" else HuggingFaceTokenizer
    return kind(name, file, label)
