"""Bytes that the forward pass of a transformer layer and of a stage keeps, and those that the passes need besides.

They are those of `mtp_dist.model` under PyTorch's autograd: a product keeps what it reads, a norm what `Norm` lists.
"""

from mtp_dist.config import Config
from mtp_dist.config.low_rank import AdaptedMatrix
from mtp_dist.config.schema import ModelPart
from mtp_dist.planner.weights import layer_weights, local_vocab_size

TOKEN_BYTES = 25
"""Bytes per token of the first stage's int64 ids, of the rows of the embedding and of the mask of other ranks' rows."""


def element_bytes(config: Config) -> int:
    """Return the bytes of one number of the weights and activations."""
    return 2 if config.train.precision == "bf16" else 4


def micro_batch_tokens(config: Config) -> int:
    """Return the tokens of a micro-batch."""
    return config.train.micro_batch_size * config.train.sequence_length


def local_tokens(config: Config) -> int:
    """Return the tokens of a micro-batch whose hidden states a rank holds between the layers."""
    return micro_batch_tokens(config) // (config.parallel.tensor if config.parallel.sequence else 1)


def hidden_bytes(config: Config) -> int:
    """Return the bytes of a micro-batch's hidden states on one rank."""
    return element_bytes(config) * local_tokens(config) * config.model.hidden_size


def norm_keeps_input(config: Config, device: str) -> bool:
    """Return whether a norm keeps its input: PyTorch's RMSNorm for bf16 on a CPU keeps an fp32 copy of it instead."""
    return device == "cuda" or config.train.precision == "fp32" or config.model.normalization == "layernorm"


def norm_activations(config: Config, device: str, frozen: bool = False) -> int:
    """Return the bytes that a norm keeps, its output included. frozen: its weight is.

    A GPU's kernel, and that of LayerNorm, keeps its input and one or two numbers per position. PyTorch's RMSNorm for
    CPUs is made of products, which keep the input in fp32 and, for the weight's gradient, the normalized input, as
    LayerNorm does there for bf16.
    """
    if config.model.normalization == "layernorm":
        keeps_normalized = device == "cpu" and config.train.precision == "bf16" and not frozen
        return (2 + keeps_normalized) * hidden_bytes(config) + 8 * local_tokens(config)
    return hidden_bytes(config) + _rms_norm_inputs(
        config, device, local_tokens(config), config.model.hidden_size, frozen
    )


def _rms_norm_inputs(config: Config, device: str, rows: int, width: int, frozen: bool) -> int:
    """Return the bytes that RMSNorm of `rows` vectors keeps besides its output."""
    copy = 4 * rows * width
    kept = element_bytes(config) * rows * width if device == "cuda" or config.train.precision == "fp32" else copy
    return kept + 4 * rows + (copy if device == "cpu" and not frozen else 0)


def has_attention_mask(config: Config) -> bool:
    """Return whether the attention has a mask besides that of causality."""
    length, window = config.train.sequence_length, config.model.sliding_window
    return not config.data.attention_across_documents or (window or length) < length


def attention_activations(config: Config, device: str, part: ModelPart) -> int:
    """Return the bytes that a layer's attention keeps: norm, query-key-value, rotated queries and keys, output."""
    model, tokens, size = config.model, micro_batch_tokens(config), element_bytes(config)
    queries, keys = model.attention_size, model.query_groups * model.head_dim
    inner = model.qkv_size + queries + keys + queries
    if has_attention_mask(config):
        # Keys and values are repeated for each query; the query-key-value product is no longer needed.
        inner = 4 * queries
    log_sum_exp = 4 * tokens * model.num_attention_heads
    rope = 4 * size * config.train.sequence_length * model.rotary_dim  # cosines and sines for queries and for keys
    head_norms = 0
    if model.qk_norm:
        rows = tokens * (model.num_attention_heads + model.query_groups) // config.parallel.tensor
        head_norms = _rms_norm_inputs(config, device, rows, model.head_dim, _is_frozen(config, part))
    return (
        _norm_and_adapter(config, device, part, "linear_qkv")
        + (size * tokens * inner + log_sum_exp) // config.parallel.tensor
        + rope
        + head_norms
    )


def mlp_activations(config: Config, device: str, part: ModelPart) -> int:
    """Return the bytes that a layer's MLP keeps: norm, both factors, SiLU, a copy of the other factor, product.

    Without a gate: norm, input and output of GELU.
    """
    copies = (4 if config.model.mlp == "swiglu" else 1) + _keeps_input(config, part, "linear_fc2")
    inner = copies * config.model.ffn_size // config.parallel.tensor
    return (
        _norm_and_adapter(config, device, part, "linear_fc1")
        + element_bytes(config) * micro_batch_tokens(config) * inner
    )


def _norm_and_adapter(config: Config, device: str, part: ModelPart, matrix: AdaptedMatrix) -> int:
    """Return the bytes that a norm keeps, with its output if the matrix that reads it has a gradient or an adapter."""
    kept = norm_activations(config, device, frozen=_is_frozen(config, part))
    return kept if _keeps_input(config, part, matrix) else kept - hidden_bytes(config)


def _is_frozen(config: Config, part: ModelPart) -> bool:
    return config.train.freezes_weights and part != "heads"


def _keeps_input(config: Config, part: ModelPart, matrix: AdaptedMatrix) -> bool:
    low_rank = config.train.low_rank
    return not _is_frozen(config, part) or (low_rank is not None and matrix in low_rank.targets)


def layer_activations(config: Config, device: str, part: ModelPart) -> int:
    """Return the bytes that a transformer layer of a part of the model keeps without activation checkpointing."""
    return attention_activations(config, device, part) + mlp_activations(config, device, part)


def kept_activations(config: Config, device: str, part: ModelPart) -> int:
    """Return the bytes that a transformer layer keeps under `train.activation_checkpointing`."""
    if config.train.activation_checkpointing == "full":
        return hidden_bytes(config)
    if config.train.activation_checkpointing == "selective":
        return attention_activations(config, device, part) + hidden_bytes(config)
    return layer_activations(config, device, part)


def layer_workspace(config: Config, device: str, part: ModelPart) -> int:
    """Return the bytes that a layer's backward pass needs besides what is kept: recomputed activations, gradients."""
    recomputed = 0
    if config.train.activation_checkpointing == "selective":
        recomputed = mlp_activations(config, device, part)
    elif config.train.activation_checkpointing == "full":
        recomputed = layer_activations(config, device, part)
    size, tokens = element_bytes(config), micro_batch_tokens(config)
    inner = size * tokens * config.model.ffn_size // config.parallel.tensor
    grad_weight = size * max(weight.elements for weight in layer_weights(config, part))
    # The gradients of SwiGLU's two factors; or of their product, with that of a matrix and of the layer's output.
    grads = max(2 * inner, inner + hidden_bytes(config) + grad_weight)
    gathered = size * tokens * config.model.hidden_size if config.parallel.sequence else 0
    return recomputed + grads + gathered


def forward_workspace(config: Config) -> int:
    """Return the bytes that a layer of a frozen trunk needs while it runs: those of its MLP, and hidden states."""
    inner = 5 * config.model.ffn_size // config.parallel.tensor
    return element_bytes(config) * micro_batch_tokens(config) * inner + 3 * hidden_bytes(config)


def stage_activations(config: Config, stage: int, trunk_layers: int, device: str) -> int:
    """Return the bytes that one micro-batch keeps on a stage until its backward pass."""
    is_first, is_last = stage == 0, stage == config.parallel.stages - 1
    states = 2 if config.heads.weighted_hidden_states else 1  # tensors that stages exchange
    ends = states * hidden_bytes(config) * ((not is_first) + (not is_last))
    ids = TOKEN_BYTES * micro_batch_tokens(config) if is_first else 0
    # DeepSpeed's copy of what arrives, which a layer would keep, and the next micro-batch, which arrives early.
    fewest = 2 * states * hidden_bytes(config) if is_last and not is_first else 0
    if config.train.freezes_trunk:
        return ends + ids + fewest
    layers = trunk_layers * kept_activations(config, device, "trunk")
    if config.heads.weighted_hidden_states and not norm_keeps_input(config, device):
        layers += trunk_layers * hidden_bytes(config)
    if has_attention_mask(config):  # all samples have the one of a sliding window
        rows = config.train.sequence_length if config.data.attention_across_documents else micro_batch_tokens(config)
        layers += element_bytes(config) * rows * config.train.sequence_length
    return max(layers, fewest) + ends + ids


def embedding_workspace(config: Config) -> int:
    """Return the bytes of the embedding's backward pass: fp32 gradients of its output and of its weight, rounded."""
    weight = local_vocab_size(config) * config.model.hidden_size
    rounded = 2 * weight if config.train.precision == "bf16" else 0
    return 4 * micro_batch_tokens(config) * config.model.hidden_size + 4 * weight + rounded
