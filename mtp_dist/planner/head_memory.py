"""Bytes of the heads' loss on the last stage."""

from mtp_dist.config import Config
from mtp_dist.config.heads import CHUNK_BYTES
from mtp_dist.planner.activations import element_bytes, hidden_bytes, layer_activations
from mtp_dist.planner.weights import block_weights, local_vocab_size


def head_loss_bytes(config: Config, device: str) -> int:
    """Return the peak bytes of the heads' loss of one micro-batch."""
    heads, vocabulary = config.heads, local_vocab_size(config)
    tokens = config.train.micro_batch_size * config.train.sequence_length
    if heads.loss_mode == "naive":
        layers = heads.num_blocks * heads.block_layers
        return layers * layer_activations(config, device) + heads.count * tokens * vocabulary * 8
    chunk = min(tokens, heads.chunk_tokens or max(1, CHUNK_BYTES[device] // (4 * vocabulary)))
    logits = chunk * vocabulary * (4 + (2 if config.train.precision == "bf16" else 0))
    chained = heads.traits.reads != "trunk"
    layers = heads.block_layers * (heads.num_blocks if chained else 1)
    blocks = sum(weight.elements for weight in block_weights(config, "heads")) * heads.num_blocks
    unembedding = 4 * vocabulary * config.model.hidden_size
    grads = element_bytes(config) * blocks + unembedding
    return layers * layer_activations(config, device) + logits + grads + 4 * hidden_bytes(config)
