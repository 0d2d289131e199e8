"""The weights that one rank of a pipeline stage holds."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mtp_dist.config import Config
from mtp_dist.config.heads import condition_rank
from mtp_dist.config.model import layer_shapes, norm_shapes
from mtp_dist.config.schema import ModelPart


class Weight(NamedTuple):
    """A parameter on one rank, with tensor-parallel sharding and the padding of the vocabulary."""

    shape: tuple[int, ...]
    part: ModelPart
    is_trained: bool
    """False if it is frozen."""
    module: str = ""
    """Module of a transformer layer that has it, such as `mlp.linear_fc1`."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def stage_weights(config: Config, stage: int, trunk_layers: int, heads: int | None = None) -> Iterator[Weight]:
    """Yield the weights of one rank of a pipeline stage, counted from 0, with a number of trunk layers.

    heads: number of its heads, see `rank_memory`. An embedding that a stage with heads needs too, for tokens that they
    read or as a tied unembedding, counts on both unless both are on one rank.
    """
    if heads is None:
        heads = config.heads.count if stage == config.parallel.stages - 1 else 0
    is_first = stage == 0
    if is_first or (heads and heads_have_embedding(config) and config.parallel.schedule == "1f1b"):
        yield _weight(config, "embedding", local_vocab_size(config), config.model.hidden_size)
    if config.heads.weighted_hidden_states and (trunk_layers or is_first):
        yield _weight(config, "heads", config.model.trunk_layers + 1)
    yield from trunk_layers * tuple(layer_weights(config, "trunk"))
    if heads:
        has_head_1 = stage == config.parallel.stages - config.heads.stages
        yield from _heads_stage_weights(config, has_head_1, heads - has_head_1)


def local_vocab_size(config: Config) -> int:
    """Return the rows of embedding and unembedding on one tensor-parallel rank."""
    return config.padded_vocab_size // config.parallel.tensor


def heads_have_embedding(config: Config) -> bool:
    """Return whether the heads' stage has the embedding too, as output layer or to embed tokens that heads read."""
    return config.model.tie_embeddings or config.heads.traits.embeds_tokens


def layer_weights(config: Config, part: ModelPart) -> Iterator[Weight]:
    """Yield the weights of one transformer layer. Those of trunk and head 1 have the low-rank adapters."""
    shards, low_rank = config.parallel.tensor, config.train.low_rank
    for name, (rows, *columns) in layer_shapes(config.model).items():
        module = name.rpartition(".")[0]
        if module.endswith(("linear_qkv", "linear_fc1")):
            rows //= shards
        columns = [size // shards if module.endswith(("linear_proj", "linear_fc2")) else size for size in columns]
        yield _weight(config, part, rows, *columns)._replace(module=module)
        if columns and low_rank and module.endswith(low_rank.targets) and part != "heads":
            yield Weight((low_rank.rank, *columns), part, is_trained=True, module=module)
            yield Weight((rows, low_rank.rank), part, is_trained=True, module=module)


def block_weights(config: Config, part: ModelPart) -> Iterator[Weight]:
    """Yield the weights of one head's block. Those that are not in transformer layers are not sharded."""
    for shape in config.heads.traits.weights.values():
        if len(shape) == 1:
            yield from _norm_weights(config, part)
        else:
            yield _weight(config, part, *(config.model.hidden_size * size for size in shape))
    for _ in range(config.heads.block_layers):
        yield from layer_weights(config, part)


def _heads_stage_weights(config: Config, has_head_1: bool, later: int) -> Iterator[Weight]:
    """Yield the weights of head 1, if the stage has it, and of its number of later heads, the final norm and the
    unembeddings, without an unembedding that is tied to the embedding."""
    heads, hidden = config.heads, config.model.hidden_size
    unembedding = local_vocab_size(config), hidden
    if heads.traits.first_head_has_block and has_head_1:
        yield from block_weights(config, "head_1")
    yield from (min(1, later) if heads.repeated else later) * tuple(block_weights(config, "heads"))
    yield from _norm_weights(config, "trunk")
    if rank := condition_rank(heads, hidden):
        yield _weight(config, "heads", local_vocab_size(config), rank)
        for _ in range(later):
            yield _weight(config, "heads", hidden, rank)
    if heads.unembedding == "separate":
        for _ in range(has_head_1):
            yield _weight(config, "head_1", *unembedding)
        for _ in range(later):
            yield _weight(config, "heads", *unembedding)
    elif not config.model.tie_embeddings:
        yield _weight(config, "unembedding", *unembedding)
    if heads.token_order:
        yield _weight(config, "heads", *unembedding)


def _norm_weights(config: Config, part: ModelPart) -> Iterator[Weight]:
    """Yield the weights of a norm of hidden states."""
    for shape in norm_shapes("norm", config.model).values():
        yield _weight(config, part, *shape)


def _weight(config: Config, part: ModelPart, *shape: int) -> Weight:
    return Weight(shape, part, is_trained=part == "heads" or not config.train.freezes_weights)
