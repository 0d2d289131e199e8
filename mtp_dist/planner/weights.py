"""The weights that one rank of a pipeline stage holds."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mtp_dist.config import Config
from mtp_dist.config.heads import condition_rank
from mtp_dist.config.schema import ModelPart


class Weight(NamedTuple):
    """A parameter on one rank, tensor-parallel sharding and vocabulary padding included."""

    shape: tuple[int, ...]
    part: ModelPart

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def is_trained(self, config: Config) -> bool:
        """Return whether training changes it."""
        return not config.train.freezes_trunk or self.part == "heads"


def stage_weights(config: Config, stage: int, trunk_layers: int) -> Iterator[Weight]:
    """Yield the weights of one rank of a pipeline stage, counted from 0, that holds so many trunk layers.

    An embedding that the last stage needs too, for tokens that heads read or as a tied unembedding, counts on both
    unless both are on one rank.
    """
    is_first, is_last = stage == 0, stage == config.parallel.stages - 1
    if is_first or (is_last and heads_have_embedding(config) and config.parallel.schedule == "1f1b"):
        yield Weight((local_vocab_size(config), config.model.hidden_size), "embedding")
    if config.heads.weighted_hidden_states and trunk_layers:
        yield Weight((config.model.trunk_layers + 1,), "heads")
    for _ in range(trunk_layers):
        yield from layer_weights(config, "trunk")
    if is_last:
        yield from _heads_stage_weights(config)


def local_vocab_size(config: Config) -> int:
    """Return the rows of embedding and unembedding on one tensor-parallel rank."""
    return config.padded_vocab_size // config.parallel.tensor


def heads_have_embedding(config: Config) -> bool:
    """Return whether the heads' stage has the embedding too, as output layer or to embed tokens that heads read."""
    return config.model.tie_embeddings or config.heads.traits.embeds_tokens


def layer_weights(config: Config, part: ModelPart) -> Iterator[Weight]:
    """Yield the weights of one transformer layer."""
    model, shards = config.model, config.parallel.tensor
    hidden, ffn = model.hidden_size, model.ffn_size // shards
    yield Weight((hidden,), part)
    yield Weight(((hidden + 2 * model.query_groups * model.head_dim) // shards, hidden), part)
    yield Weight((hidden, hidden // shards), part)
    yield Weight((hidden,), part)
    yield Weight((2 * ffn, hidden), part)
    yield Weight((hidden, ffn), part)


def block_weights(config: Config, part: ModelPart) -> Iterator[Weight]:
    """Yield the weights of one head's block. Those that are not in transformer layers are not sharded."""
    for shape in config.heads.traits.weights.values():
        yield Weight(tuple(config.model.hidden_size * size for size in shape), part)
    for _ in range(config.heads.block_layers):
        yield from layer_weights(config, part)


def _heads_stage_weights(config: Config) -> Iterator[Weight]:
    """Yield the weights of all heads, the final norm and the unembeddings, without an unembedding that is tied."""
    heads, hidden = config.heads, config.model.hidden_size
    unembedding = local_vocab_size(config), hidden
    if heads.traits.first_head_has_block:
        yield from block_weights(config, "head_1")
    for _ in range(min(1, heads.count - 1) if heads.repeated else heads.count - 1):
        yield from block_weights(config, "heads")
    yield Weight((hidden,), "trunk")  # the final norm
    if rank := condition_rank(heads, hidden):
        yield Weight((local_vocab_size(config), rank), "heads")
        for _ in range(heads.count - 1):
            yield Weight((hidden, rank), "heads")
    if heads.unembedding == "separate":
        yield Weight(unembedding, "head_1")
        for _ in range(heads.count - 1):
            yield Weight(unembedding, "heads")
    elif not config.model.tie_embeddings:
        yield Weight(unembedding, "unembedding")
    if heads.token_order:
        yield Weight(unembedding, "heads")
