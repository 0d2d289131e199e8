"""How many parameters a model has, how many FLOPs a trained position costs, and what a GPU could do at best."""

import re
from dataclasses import dataclass

from mtp_dist.config import Config, ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part of the model. No matrix has a bias."""

    trunk: int
    """The trunk's transformer layers."""
    heads: int
    """The prediction heads' layers and the final norm that they share."""
    embeddings: int
    """Embedding and unembeddings, V*D each: n of them where they are separate, none where they are tied."""

    @property
    def total(self) -> int:
        return self.trunk + self.heads + self.embeddings


def layer_matrices(model: ModelConfig) -> int:
    """Parameters of one layer's matrices: query-key-value [D, D + 2*G*C], projection [D, D], SwiGLU 3 * [D, F].

    G is the number of query groups, C the channels of an attention head.
    """
    hidden = model.hidden_size
    query_key_value = hidden * (hidden + 2 * model.query_groups * model.head_dim)
    return query_key_value + hidden * hidden + 3 * hidden * model.ffn_size


def _unembeddings(config: Config) -> int:
    """Matrices of unembeddings that are not the embedding's too."""
    further = 1 if config.heads.token_order else 0
    if config.heads.unembedding == "separate":
        return config.heads.count + further
    return further + (0 if config.model.tie_embeddings else 1)


def _extra_matrix(config: Config) -> int:
    """Parameters of the matrix that a head's block has beside its transformer layers."""
    squares = {"linear": 1, "mlp": 1, "sequential": 2}
    return squares.get(config.heads.kind, 0) * config.model.hidden_size**2


def _extra_parameters(config: Config) -> int:
    """The same with the two norms that a `sequential` block has before its matrix."""
    return _extra_matrix(config) + (2 * config.model.hidden_size if config.heads.kind == "sequential" else 0)


def head_matrices(config: Config, active: int) -> int:
    """Parameters of the matrices that multiply one position in heads 1..active; a shared one counts for each user."""
    heads = config.heads
    block = heads.block_layers * layer_matrices(config.model) + _extra_matrix(config)
    unembeddings = active + (1 if heads.token_order else 0)
    return heads.active_blocks(active) * block + unembeddings * config.vocab_size * config.model.hidden_size


def parameter_counts(config: Config) -> ParameterCounts:
    """Parameters of the unsharded model with a vocabulary of V tokens."""
    model = config.model
    layer = layer_matrices(model) + 2 * model.hidden_size  # a norm before the attention, one before the MLP
    blocks = min(1, config.heads.blocks) if config.heads.repeated else config.heads.blocks
    return ParameterCounts(
        trunk=model.trunk_layers * layer,
        heads=blocks * (config.heads.block_layers * layer + _extra_parameters(config)) + model.hidden_size,
        embeddings=(1 + _unembeddings(config)) * config.vocab_size * model.hidden_size,
    )


def model_flops_per_token(config: Config, active: int) -> int:
    """FLOPs of the matrix products, forward and backward, for one trained position while heads 1..active run.

    The convention of PaLM (arXiv:2204.02311, appendix B): 6 for each parameter of a matrix that multiplies the
    position, plus 12 * layers * D * S for the attention's two products. The attention is counted over all S keys
    although causality needs half of them, as PaLM does, so that the numbers compare with published ones; what
    activation checkpointing computes twice is not counted. Trunk and head layers count alike, the unembedding
    once for each head, the embedding's look-up not at all.
    """
    model = config.model
    layers = model.trunk_layers + config.heads.active_blocks(active) * config.heads.block_layers
    matrices = model.trunk_layers * layer_matrices(model) + head_matrices(config, active)
    return 6 * matrices + 12 * layers * model.hidden_size * config.train.sequence_length


# Dense bf16 FLOP/s from NVIDIA's data sheets (half of the figures "with sparsity"), by the words of the device's name.
# A word that names a slower variant is part of the key, so that a variant without an entry has no peak.
_BF16_PEAKS = {
    frozenset({"a100"}): 312e12,
    frozenset({"a100", "pcie"}): 312e12,
    frozenset({"h100"}): 989e12,
    frozenset({"h100", "pcie"}): 756e12,
    frozenset({"h200"}): 989e12,
    frozenset({"b200"}): 2250e12,
    frozenset({"l40s"}): 362e12,
    frozenset({"4090"}): 165e12,
}
_TELLING_WORDS = frozenset().union(*_BF16_PEAKS) | {"nvl", "mig", "laptop", "d"}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense matrix FLOP/s of one device, named as `torch.cuda.get_device_name` does; None where it is unknown.

    Only `bf16` has peaks: that of fp32 depends on whether the run allows TF32.
    """
    if precision != "bf16":
        return None
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return _BF16_PEAKS.get(_TELLING_WORDS.intersection(words))
