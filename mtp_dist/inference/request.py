"""Requests of a text to generate: the rules of the arguments, and the tokens of a prompt.

Nothing here imports torch, so that a command can check its options before it does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mtp_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mtp_dist.config import Config
    from mtp_dist.data.tokenizer import Tokenizer

MIN_TEMPERATURE = 0.001
"""Smallest temperature above 0: logits divided by it do not overflow."""


def check_numbers(max_new_tokens: int, temperature: float, heads: int | None) -> None:
    """Raise ConfigError for a number that makes no sense for any model."""
    if heads is not None and heads < 1:
        raise ConfigError(f"--speculative = {heads} is below 1: use 1 for plain decoding, or a number of heads")
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens = {max_new_tokens} is below 1: use at least 1")
    if temperature and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ConfigError(
            f"--temperature = {temperature}: use 0 for the most probable tokens, or a number from "
            f"{MIN_TEMPERATURE} on, such as 0.7"
        )


def check_model(config: Config, prompt_tokens: int, heads: int | None) -> None:
    """Raise ConfigError for more heads than the model has, or a prompt that leaves no position for a new token."""
    check_heads(config, heads)
    if prompt_tokens >= text_limit(config):
        raise ConfigError(f"--prompt has {prompt_tokens} tokens, but {describe_text_limit(config)}: shorten it")


def text_limit(config: Config) -> int:
    """Return the number of tokens of the longest text that the model may generate, its prompt included.

    It was trained on texts of `train.sequence_length`. With `dynamic` scaling the base of the rotary embedding changes
    with each token beyond the original length, and cached keys would keep that of an earlier one.
    """
    return min(config.train.sequence_length, config.model.dynamic_length or config.train.sequence_length)


def describe_text_limit(config: Config) -> str:
    """Return the reason of `text_limit`, for a message."""
    length = config.train.sequence_length
    if (limit := text_limit(config)) == length:
        return f"the model was trained on texts of {length}"
    return describe_dynamic_limit(limit)


def describe_dynamic_limit(length: int) -> str:
    """Return the reason why texts end at the original length with `dynamic` scaling, for a message."""
    return (
        "model.rope_scaling.rope_type = 'dynamic' limits texts to model.rope_scaling.original_max_position_embeddings "
        f"= {length}"
    )


def check_heads(config: Config, heads: int | None) -> None:
    """Raise ConfigError if the model does not have that many heads."""
    count = config.heads.count
    if heads is None or 1 <= heads <= count:
        return
    if count == 1:
        raise ConfigError(f"--speculative = {heads}, but the model has one head, which drafts nothing: use 1")
    raise ConfigError(
        f"--speculative = {heads}, but the model has {count} heads: use 1 for plain decoding, or up to {count}"
    )


def prompt_ids(prompt: str, config: Config, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a text that begins a document, as `Generator.prompt_ids` does."""
    try:
        text = tokenizer.encode(prompt.encode(errors="surrogateescape")).tolist()
    except (DataError, UnicodeEncodeError) as error:
        raise DataError(f"--prompt cannot be encoded: {error}") from None
    return [tokenizer.end_of_document, *text] if config.data.attention_across_documents or not text else text
