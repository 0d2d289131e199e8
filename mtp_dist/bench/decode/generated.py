"""Models that continue texts in a known way, with heads that are right as often as wanted.

Nothing in the decoder is replaced: the weights decide. The text is a cycle of random tokens. The trunk's layers have
small random weights and hardly change the embedding of the last token, and the unembedding of a token is the embedding
of the one before it, so head 1 is always right. The MLP of each other head is a table, one row per token of the cycle:
from the token that it reads to the one before its target, or to another one where the head is to be wrong.
"""

import torch
from torch import Tensor

from mtp_dist.config import Config
from mtp_dist.model.parameters import initial_weight, parameter_shapes

TABLE_GAIN = 10.0
"""Size of a table's output, relative to the embedding that it is added to."""


def cycle_tokens(config: Config) -> Tensor:
    """Return the tokens of the text in their order."""
    generator = torch.Generator().manual_seed(config.run.seed)
    size = min(config.model.ffn_size, config.vocab_size)
    return torch.randperm(config.vocab_size, generator=generator)[:size]


def generated_weights(config: Config, acceptance: float) -> dict[str, Tensor]:
    """Return the weights by global name. acceptance: fraction of the cycle's tokens that each head is right for."""
    heads, width = config.heads, config.model.hidden_size
    weights = {name: initial_weight(config, name, shape) for name, shape in parameter_shapes(config).items()}
    generator = torch.Generator().manual_seed(config.run.seed + 1)
    tokens = cycle_tokens(config)
    embeddings = torch.randn(len(tokens), width, generator=generator)
    weights["embedding.weight"][tokens] = embeddings
    weights["unembedding.weight"][tokens.roll(-1)] = embeddings
    for k in range(2, heads.count + 1):
        prefix, shift = f"heads.{k}", k - 1
        if heads.traits.embeds_tokens:
            # The block reads the token before its target.
            weights[f"{prefix}.eh_proj.weight"].copy_(torch.eye(width, 2 * width))
            prefix, shift = f"{prefix}.layers", 0
        indices = torch.arange(len(tokens))
        right = torch.rand(len(tokens), generator=generator) < acceptance
        others = torch.randint(1, len(tokens), (len(tokens),), generator=generator)
        outputs = (indices + torch.where(right, shift, shift + others)) % len(tokens)
        _write_table(weights, f"{prefix}.0.mlp", embeddings, embeddings[outputs])
    return weights


def _write_table(weights: dict[str, Tensor], name: str, keys: Tensor, values: Tensor) -> None:
    """Let a SwiGLU of F >= N rows map each of the keys `[N, D]` to TABLE_GAIN times its value `[N, D]`."""
    gate, linear = weights[f"{name}.linear_fc1.weight"].chunk(2)
    size, width = keys.shape
    # A key's own row has the products 10 and 1, silu(10) is 10; other keys are nearly orthogonal.
    gate[:size], linear[:size] = 10 * keys / width, keys / width
    weights[f"{name}.linear_fc2.weight"][:, :size] = TABLE_GAIN / 10 * values.T
