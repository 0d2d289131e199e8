"""Parameters of a model, and FLOPs per trained position."""

import math
from dataclasses import dataclass

from mtp_dist.config import Config, ModelConfig
from mtp_dist.config.heads import condition_rank
from mtp_dist.config.model import layer_shapes, norm_shapes


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part of the model."""

    trunk: int
    """The trunk's transformer layers."""
    heads: int
    """The prediction heads' layers, the matrices of their condition, the weights of the hidden states they read and the
    final norm that they share."""
    embeddings: int
    """Embedding and unembeddings, V*D each: n of them if they are separate, none if they are tied. The condition's
    embedding has V*r."""

    @property
    def total(self) -> int:
        return self.trunk + self.heads + self.embeddings


def layer_matrices(model: ModelConfig) -> int:
    """Return the parameters of one layer's matrices.

    They are query-key-value [D, (H + 2*G)*C], projection [H*C, D] and SwiGLU's 3 * [D, F], or 2 * [D, F] without a
    gate. H is the number of query heads, G that of query groups, C the channels of an attention head.
    """
    return sum(math.prod(shape) for shape in layer_shapes(model).values() if len(shape) == 2)


def _layer_vectors(model: ModelConfig) -> int:
    """Return the parameters of one layer's norms and biases."""
    return sum(math.prod(shape) for shape in layer_shapes(model).values() if len(shape) == 1)


def _norm_parameters(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in norm_shapes("norm", model).values())


def attended_positions(config: Config) -> int:
    """Return the largest number of positions that a position attends to."""
    length = config.train.sequence_length
    return min(length, config.model.sliding_window or length)


def adapter_parameters(config: Config) -> int:
    """Return the parameters of one layer's low-rank adapters."""
    model, low_rank = config.model, config.train.low_rank
    if low_rank is None:
        return 0
    sides = {
        "linear_qkv": model.hidden_size + model.qkv_size,
        "linear_proj": model.attention_size + model.hidden_size,
        "linear_fc1": model.hidden_size + model.fc1_size,
        "linear_fc2": model.ffn_size + model.hidden_size,
    }
    return low_rank.rank * sum(sides[name] for name in set(low_rank.targets))


def _unembeddings(config: Config) -> int:
    """Return the number of unembedding matrices, without one that is the embedding's."""
    token_order = 1 if config.heads.token_order else 0
    if config.heads.unembedding == "separate":
        return config.heads.count + token_order
    return token_order + (0 if config.model.tie_embeddings else 1)


def _extra_matrix(config: Config) -> int:
    """Return the parameters of the matrix that a head's block has in addition to its transformer layers."""
    squares = sum(math.prod(shape) for shape in config.heads.traits.weights.values() if len(shape) == 2)
    return squares * config.model.hidden_size**2


def _state_weights(config: Config) -> int:
    """Return the number of weights of the trunk's hidden states in the sum that heads 2..n read."""
    return config.model.trunk_layers + 1 if config.heads.weighted_hidden_states else 0


def block_matrices(config: Config) -> int:
    """Return the parameters of the matrices of one head's block."""
    return config.heads.block_layers * layer_matrices(config.model) + _extra_matrix(config)


def _condition_matrix(config: Config) -> int:
    """Return the parameters of the matrix [D, r] that a head from head 2 on has for `heads.condition`."""
    return condition_rank(config.heads, config.model.hidden_size) * config.model.hidden_size


def _block_parameters(config: Config) -> int:
    """Return the parameters of one head's block."""
    norms = sum(len(shape) == 1 for shape in config.heads.traits.weights.values())
    vectors = config.heads.block_layers * _layer_vectors(config.model) + norms * _norm_parameters(config.model)
    return block_matrices(config) + vectors


def parameter_counts(config: Config) -> ParameterCounts:
    """Return the parameters of the unsharded model with a vocabulary of V tokens."""
    model = config.model
    layer = layer_matrices(model) + _layer_vectors(model)
    adapters = adapter_parameters(config)
    blocks = min(1, config.heads.num_blocks) if config.heads.repeated else config.heads.num_blocks
    conditions = (config.heads.count - 1) * _condition_matrix(config)
    width = (1 + _unembeddings(config)) * model.hidden_size + condition_rank(config.heads, model.hidden_size)
    return ParameterCounts(
        trunk=model.trunk_layers * (layer + adapters),
        heads=blocks * _block_parameters(config)
        + config.heads.adapted_layers * adapters
        + conditions
        + _state_weights(config)
        + _norm_parameters(model),
        embeddings=config.vocab_size * width,
    )


def trained_parameters(config: Config) -> int:
    """Return the number of parameters that training changes."""
    counts, hidden = parameter_counts(config), config.model.hidden_size
    if not config.train.freezes_weights:
        return counts.total
    base = parameter_counts(config.without_adapters())
    heads = base.heads - _norm_parameters(config.model)  # without the final norm
    if config.heads.traits.first_head_has_block:
        heads -= _block_parameters(config)
    frozen_embeddings = 1 if config.model.tie_embeddings else 2  # with head 1's unembedding
    embeddings = base.embeddings - frozen_embeddings * config.vocab_size * hidden
    return heads + embeddings + counts.total - base.total


def model_flops_per_token(config: Config, active: int) -> int:
    """Return the FLOPs of all matrix products, forward and backward, per trained position while heads 1..active run.

    The convention of PaLM (arXiv:2204.02311, appendix B): 6 for each parameter of a matrix that multiplies the
    position, plus 12 * layers * H*C * S for the attention's two products, H*C = D unless `kv_channels` is set. The
    attention is counted over all S keys, or those of a sliding window, although causality needs half of them, as PaLM
    does, so that the numbers compare with published ones; what activation checkpointing computes twice is not counted.
    Trunk and head layers count alike, the unembedding once per head, the embedding's lookup not at all. A frozen trunk
    (`train.freeze`) has no backward pass: 2 and 4; with `train.low_rank` a frozen matrix has the gradient of what it
    reads: 4 and 12. A weighted sum of hidden states is a product with one row.
    """
    matrices, attention = 2 * layer_matrices(config.model), 4 * config.model.attention_size * attended_positions(config)
    layer = matrices + attention
    passes = 2 if config.train.freezes_trunk else 3  # backward also the gradient of the states, unless they are frozen
    weighted_sum = 2 * _state_weights(config) * config.model.hidden_size * passes
    if config.train.freezes_trunk:
        trunk_layer = layer
    else:
        trunk_layer = 3 * layer
        if config.train.low_rank:
            trunk_layer += 3 * 2 * adapter_parameters(config) - matrices
    return config.model.trunk_layers * trunk_layer + _head_flops(config, active, attention) + weighted_sum


def _head_flops(config: Config, active: int, attention: int) -> int:
    """Return the FLOPs of heads 1..active per position of a training step. attention: forward FLOPs of one layer's.

    The backward pass of a product has two of its size: the gradient of what the matrix reads, and that of the matrix
    unless it is frozen.
    """
    heads, order = config.heads, 1 if config.heads.token_order else 0
    blocks = 2 * block_matrices(config)
    block = blocks + heads.block_layers * attention
    unembedding = 2 * config.vocab_size * config.model.hidden_size
    later, condition = active - 1, 2 * _condition_matrix(config)
    forward = heads.active_blocks(active) * block + later * condition + (active + order) * unembedding
    if config.train.freezes_trunk:
        unembedding_products = later * (2 if heads.unembedding == "separate" else 1) + order
        return forward + 2 * later * (block + condition) + unembedding_products * unembedding
    if config.train.low_rank is None:
        return 3 * forward
    frozen_products = blocks if heads.traits.first_head_has_block else 0
    frozen_products += (1 if heads.unembedding == "separate" else active) * unembedding
    return 3 * (forward + 2 * heads.adapted_layers * adapter_parameters(config)) - frozen_products
