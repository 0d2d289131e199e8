"""Bytes that the forward pass of a transformer layer and of a stage keeps for the backward pass."""

from mtp_dist.config import Config


def element_bytes(config: Config) -> int:
    """Return the bytes of one number of the weights and activations."""
    return 2 if config.train.precision == "bf16" else 4


def hidden_bytes(config: Config) -> int:
    """Return the bytes of a micro-batch's hidden states on one rank."""
    return element_bytes(config) * local_tokens(config) * config.model.hidden_size


def local_tokens(config: Config) -> int:
    """Return the tokens of a micro-batch whose hidden states a rank holds between the layers."""
    shards = config.parallel.tensor if config.parallel.sequence else 1
    return config.train.micro_batch_size * config.train.sequence_length // shards


def layer_activations(config: Config, device: str) -> int:
    """Return the bytes that a transformer layer keeps without activation checkpointing, its input included."""
    return _attention_activations(config, device) + _mlp_activations(config, device)


def kept_activations(config: Config, device: str) -> int:
    """Return the bytes that a transformer layer keeps under `train.activation_checkpointing`, its input included."""
    kept = {
        "none": layer_activations(config, device),
        "selective": _attention_activations(config, device) + hidden_bytes(config),
        "full": hidden_bytes(config),
    }
    return kept[config.train.activation_checkpointing]


def stage_activations(config: Config, stage: int, trunk_layers: int, device: str) -> int:
    """Return the bytes that one micro-batch keeps on a stage until its backward pass."""
    return trunk_layers * kept_activations(config, device) + hidden_bytes(config)


def _attention_activations(config: Config, device: str) -> int:
    """Return the bytes that a layer's attention keeps: input, its norm, queries, keys, values, output."""
    model, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    keys = model.query_groups * model.head_dim
    inner = 3 * model.hidden_size + 3 * keys  # query-key-value, rotated queries and keys, output
    log_sum_exp = 4 * tokens * model.num_attention_heads
    return (
        _norm_activations(config, device)
        + 2 * hidden_bytes(config)
        + (element_bytes(config) * tokens * inner + log_sum_exp) // config.parallel.tensor
    )


def _mlp_activations(config: Config, device: str) -> int:
    """Return the bytes that a layer's MLP keeps: its input, its norm, SwiGLU's two factors, SiLU, the product."""
    tokens = config.train.micro_batch_size * config.train.sequence_length
    inner = 4 * config.model.ffn_size // config.parallel.tensor
    return _norm_activations(config, device) + 2 * hidden_bytes(config) + element_bytes(config) * tokens * inner


def _norm_activations(config: Config, device: str) -> int:
    """Return the bytes that an RMSNorm keeps besides its input. PyTorch's for CPUs keeps fp32 intermediates."""
    statistics = 4 * local_tokens(config)
    if device == "cuda":
        return statistics
    copies = 2 if config.train.precision == "bf16" else 1
    return statistics + copies * 4 * local_tokens(config) * config.model.hidden_size
