"""Bytes of the heads' loss on the last stage, as `mtp_dist.loss` computes it."""

from dataclasses import dataclass

from mtp_dist.config import Config
from mtp_dist.config.heads import CHUNK_BYTES
from mtp_dist.config.schema import ModelPart
from mtp_dist.planner.activations import (
    element_bytes,
    hidden_bytes,
    kept_activations,
    layer_workspace,
    local_tokens,
    micro_batch_tokens,
    norm_activations,
    norm_keeps_input,
)
from mtp_dist.planner.weights import block_weights, local_vocab_size

POSITION_BYTES = 100
"""Bytes per position of the softmax's statistics: its maximum, sum, log, loss and so on."""


@dataclass(frozen=True)
class HeadLossMemory:
    """Bytes of the heads' loss of one micro-batch."""

    peak: int
    """Peak above what the trunk keeps."""
    waiting: int
    """Gradients that were computed in the forward pass and wait for the backward pass (mode `eager`)."""


def head_loss_memory(config: Config, device: str) -> HeadLossMemory:
    """Return the memory of the heads' loss."""
    if config.heads.loss_mode == "naive":
        return HeadLossMemory(_all_graphs(config, device), 0)
    grad_trunk = 0 if config.train.freezes_trunk else 4 * local_tokens(config) * config.model.hidden_size
    states = hidden_bytes(config)
    if config.heads.weighted_hidden_states:  # z and the sum are one tensor
        grad_trunk, states = 2 * grad_trunk, 4 * hidden_bytes(config)
    else:
        states = 0
    block, blocks = _block_gradients(config)
    at_loss, rounded = _unembedding_gradients(config)
    finished = grad_trunk + blocks + at_loss + (rounded if element_bytes(config) == 2 else 0)
    peak = grad_trunk + states + at_loss + _last_loss(config, device)
    if config.heads.traits.reads == "trunk":
        peak += max(0, blocks - block)  # the heads before have theirs
    waiting = element_bytes(config) * grad_trunk // 4 + blocks + rounded
    return HeadLossMemory(max(peak, finished), waiting if config.heads.loss_mode == "eager" else 0)


def chunk_positions(config: Config, device: str) -> int:
    """Return the positions whose logits are in memory at once."""
    tokens = micro_batch_tokens(config)
    most = config.heads.chunk_tokens or max(1, CHUNK_BYTES[device] // (4 * local_vocab_size(config)))
    return -(-tokens // -(-tokens // most))


def _last_loss(config: Config, device: str) -> int:
    """Return the bytes of the activations of the last head, of all heads if they are chained, and of its loss."""
    heads = config.heads
    part = last_part(config)
    blocks = min(1, heads.num_blocks)
    inside = 0
    if heads.traits.reads != "trunk":
        blocks = heads.num_blocks
        inside = 2 * heads.count * hidden_bytes(config)  # each head's hidden states and their gradient
    inside += blocks * _block_activations(config, device, part)
    loss = (
        norm_activations(config, device, frozen=_final_norm_is_frozen(config))
        + _logits(config, device)
        + _soft_targets(config)
    )
    return inside + max(loss, layer_workspace(config, device, part) + hidden_bytes(config))


def last_part(config: Config) -> ModelPart:
    """Return the part of the model to which the last head belongs."""
    return "heads" if config.heads.count > 1 else "head_1"


def _final_norm_is_frozen(config: Config) -> bool:
    return config.train.freezes_weights or (config.heads.detach == "full" and config.heads.count > 1)


def _block_activations(config: Config, device: str, part: ModelPart) -> int:
    """Return the bytes that one head's block keeps, its input included."""
    heads, hidden = config.heads, hidden_bytes(config)
    layers = heads.block_layers * kept_activations(config, device, part)
    if heads.traits.embeds_tokens and config.train.activation_checkpointing != "full":
        layers += 2 * norm_activations(config, device)  # whose outputs are concatenated
    if heads.block_layers and not heads.traits.embeds_tokens and norm_keeps_input(config, device):
        return layers
    return layers + hidden


def _block_gradients(config: Config) -> tuple[int, int]:
    """Return the bytes of the gradients of one trained block, and of all trained blocks."""
    heads, size = config.heads, element_bytes(config)
    weights = list(block_weights(config, "heads"))
    first = 0
    if heads.traits.first_head_has_block:
        first = sum(weight.elements for weight in block_weights(config, "head_1") if weight.is_trained)
    block = size * sum(weight.elements for weight in weights)
    others = min(1, heads.count - 1) if heads.repeated else heads.count - 1
    # What several heads add to is summed in fp32.
    return block, size * first + others * block * (4 // size if heads.repeated and heads.count > 2 else 1)


def _unembedding_gradients(config: Config) -> tuple[int, int]:
    """Return the bytes of the gradients of the unembeddings, and of embeddings that heads read, at the last head's
    loss, where the last is summed in fp32, and when all are rounded."""
    heads, size = config.heads, element_bytes(config)
    separate, order = heads.unembedding == "separate", 1 if heads.token_order else 0
    trained = 0 if config.train.freezes_weights and not separate else 1
    if separate:
        trained = heads.count - (1 if config.train.freezes_weights else 0)
    at_loss = (4 + size * (trained - 1) if trained else 0) + 4 * order
    rounded = size * (trained + order)
    if heads.traits.embeds_tokens and not config.train.freezes_weights and heads.detach != "full":
        rounded += size if heads.count == 2 else 4
    weight = local_vocab_size(config) * config.model.hidden_size
    return weight * at_loss, weight * rounded


def _logits(config: Config, device: str) -> int:
    """Return the bytes of a chunk's logits and their gradient, and of the gradient of what the unembedding reads."""
    hidden, vocabulary, chunk = config.model.hidden_size, local_vocab_size(config), chunk_positions(config, device)
    size, trains_unembedding = element_bytes(config), _unembedding_gradients(config)[0] > 0
    logits = 4 * chunk * vocabulary
    if size == 2:
        logits += 2 * chunk * vocabulary
        if device == "cpu":  # whose products convert what they read to fp32
            logits += 4 * chunk * hidden + 4 * vocabulary * (max(chunk, hidden) if trains_unembedding else hidden)
    copies = 2 if config.parallel.sequence else 1
    return logits + POSITION_BYTES * chunk + copies * size * micro_batch_tokens(config) * hidden


def _soft_targets(config: Config) -> int:
    """Return the bytes of head 1's distribution for the others, and of the order of the upcoming tokens."""
    heads, tokens = config.heads, micro_batch_tokens(config)
    order = 12 * heads.token_order_window * tokens if heads.token_order else 0
    if not (heads.distillation or heads.total_variation):
        return order
    return order + 48 * min(heads.distillation_top, config.vocab_size) * tokens


def _all_graphs(config: Config, device: str) -> int:
    """Return the bytes of the graphs of all heads and their logits (mode `naive`)."""
    heads, tokens = config.heads, micro_batch_tokens(config)
    logits = tokens * local_vocab_size(config)
    shared = hidden_bytes(config) if norm_keeps_input(config, device) else 0  # a head's output is the norm's input
    block = _block_activations(config, device, last_part(config)) - shared
    norms = norm_activations(config, device, frozen=_final_norm_is_frozen(config))
    transient = 2 * logits if element_bytes(config) == 2 else 0
    return heads.num_blocks * block + heads.count * (norms + 4 * logits) + transient
