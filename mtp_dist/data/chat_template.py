"""The chat template of a tokenizer."""

from pathlib import Path

from mtp_dist.config.synthetic import SYNTHETIC_PREFIX
from mtp_dist.data.sources.conversations import ChatTemplate
from mtp_dist.data.tokenizer import ByteTokenizer
from mtp_dist.errors import ConfigError


def read_chat_template(name: str, key: str = "data.tokenizer") -> ChatTemplate:
    """Read the chat template of the tokenizer that `key` names, as transformers does. Raise ConfigError without one."""
    label = f"{key} = {name!r}"
    if name == ByteTokenizer.name or (name.startswith(SYNTHETIC_PREFIX) and not Path(name).exists()):
        raise ConfigError(f"{label} has no chat template, which messages need: name the folder of a tokenizer with one")
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    from mtp_dist.data.text_tokenizers import TOKENIZER_FILES, tokenizer_file

    file = tokenizer_file(name, label)
    if file.name != TOKENIZER_FILES[0]:
        raise ConfigError(f"{label} is not a {TOKENIZER_FILES[0]}, which messages need: name the folder of one")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent)
        source = tokenizer.get_chat_template() if tokenizer.chat_template else None
    except Exception as error:  # what transformers raises has no common class
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{label}: transformers cannot read its chat template ({reason}): fix {file.parent}"
        ) from None
    if source is None:
        raise ConfigError(
            f"{label} has no chat template, which messages need: write one to {file.parent / 'chat_template.jinja'}"
        )
    special_tokens = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return ChatTemplate(name, source, dict(tokenizer.special_tokens_map), special_tokens)
