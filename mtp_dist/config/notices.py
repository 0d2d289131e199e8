"""Warnings about settings that are valid but rarely intended."""

from collections.abc import Iterator
from math import gcd

from mtp_dist.config.schema import Config


def notices(config: Config, tokenizer_vocab_size: int) -> Iterator[str]:
    """Yield one line per such setting, with its consequence. `config` is resolved."""
    warmup, steps = config.optimizer.warmup_steps, config.train.steps
    if warmup > steps:
        yield (
            f"optimizer.warmup_steps = {warmup} exceeds train.steps = {steps}: the learning rate ends at "
            f"{steps / warmup:.0%} of optimizer.lr"
        )
    if config.vocab_size > tokenizer_vocab_size:
        yield (
            f"model.vocab_size = {config.vocab_size} exceeds the {tokenizer_vocab_size} tokens of data.tokenizer = "
            f"'{config.data.tokenizer}': {config.vocab_size - tokenizer_vocab_size} token ids never occur in the data"
        )
    ranks = config.dp_size
    if config.data.train[0].stream and (parts := gcd(config.data.stream_shards, ranks)) < ranks:
        yield (
            f"data.stream_shards = {config.data.stream_shards} is not a multiple of the data-parallel degree {ranks}: "
            f"each rank tokenizes 1/{parts} of the stream instead of 1/{ranks}"
        )
