"""The weights of the plain model: trunk and head 1 as a model of transformers that has no other heads.

Both rotate channel i of an attention head with channel i + C/2 (rotary embeddings), so no rows are permuted for it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtp_dist.config import Config, HeadsConfig, ModelConfig
from mtp_dist.convert.architectures.registry import architecture_of
from mtp_dist.model.parameters import head_key

QKV, GATE_AND_UP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"


def layers_after_trunk(heads: HeadsConfig) -> list[str]:
    """Return the global names of the layers that head 1 runs after the trunk, in forward order."""
    numbers = range(heads.count if heads.traits.reads == "next head" else 1, 0, -1)
    keys = filter(None, (head_key(heads, head) for head in numbers))
    return [f"heads.{key}.{depth}" for key in keys for depth in range(heads.block_layers)]


def plain_layers(config: Config) -> list[str]:
    """Return the global names of the layers of trunk and head 1, in forward order."""
    return [f"trunk.{index}" for index in range(config.model.trunk_layers)] + layers_after_trunk(config.heads)


def plain_weights(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the plain model's weights that each weight of trunk and head 1 consists of.

    The keys are global names in forward order.
    """
    architecture = architecture_of(config.model)
    names: dict[str, tuple[str, ...]] = {"embedding.weight": (architecture.embedding,)}
    for number, layer in enumerate(plain_layers(config)):
        names |= {f"{layer}.{name}": architecture.layer_parts(number, name) for name in architecture.layer}
    names["final_norm.weight"] = (architecture.final_norm,)
    if not config.model.tie_embeddings:
        separate = config.heads.unembedding == "separate"
        names["unembeddings.1.weight" if separate else "unembedding.weight"] = (architecture.unembedding,)
    return names


def split(name: str, weight: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    """Return the plain model's weights that the weight of that global name consists of."""
    if name.endswith(GATE_AND_UP):
        return weight.chunk(2)
    if not name.endswith(QKV):
        return [weight]
    queries = model.num_attention_heads // model.query_groups
    groups = weight.view(model.query_groups, queries + 2, model.head_dim, -1)
    return [part.flatten(0, 2) for part in groups.split([queries, 1, 1], 1)]


def fuse(name: str, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Return the weight of that global name, made of the plain model's weights: the inverse of `split`."""
    if name.endswith(QKV):
        groups = [part.view(model.query_groups, -1, model.head_dim, part.shape[-1]) for part in parts]
        return torch.cat(groups, 1).flatten(0, 2)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def fused_rows(name: str, first: int, last: int, model: ModelConfig) -> Iterator[tuple[int, slice]]:
    """Yield rows first to last - 1 of what `fuse` returns, in order: the number of a part and a range of its rows."""
    if name.endswith(QKV):
        queries = model.num_attention_heads // model.query_groups
        groups, sizes = model.query_groups, [queries * model.head_dim, model.head_dim, model.head_dim]
    elif name.endswith(GATE_AND_UP):
        groups, sizes = 1, [model.ffn_size, model.ffn_size]
    else:
        groups, sizes = 1, [last]
    position = 0
    for group in range(groups):
        for part, size in enumerate(sizes):
            begin, end = max(first, position), min(last, position + size)
            if begin < end:
                offset = group * size - position
                yield part, slice(begin + offset, end + offset)
            position += size
