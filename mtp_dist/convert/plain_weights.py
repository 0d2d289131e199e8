"""The weights of the plain model: trunk and head 1 as a model of transformers that has no other heads.

Both rotate channel i of an attention head with channel i + C/2 (rotary embeddings, C rotated channels), so no rows are
permuted for it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mtp_dist.config import Config, HeadsConfig, ModelConfig
from mtp_dist.convert.architectures.registry import architecture_of
from mtp_dist.model.parameters import head_key, parameter_shapes

QKV, FC1 = ".self_attention.linear_qkv.", ".mlp.linear_fc1."
"""Parts of the global names of weights and biases that several of a plain model may form."""


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
    architecture, shapes = architecture_of(config.model), parameter_shapes(config)
    names: dict[str, tuple[str, ...]] = {"embedding.weight": (architecture.embedding,)}
    for number, layer in enumerate(plain_layers(config)):
        own = (name.removeprefix(f"{layer}.") for name in shapes if name.startswith(f"{layer}."))
        names |= {
            f"{layer}.{name}": architecture.layer_parts(number, name) for name in own if architecture.has_part(name)
        }
    for kind in ("weight", "bias"):
        if f"final_norm.{kind}" in shapes:
            names[f"final_norm.{kind}"] = (f"{architecture.final_norm}.{kind}",)
    if not config.model.tie_embeddings:
        separate = config.heads.unembedding == "separate"
        names["unembeddings.1.weight" if separate else "unembedding.weight"] = (architecture.unembedding,)
    return names


def _layout(name: str, rows: int, model: ModelConfig) -> tuple[int, list[int]]:
    """Return the number of groups of rows in the weight of that global name, and the rows per part in each of them.

    rows: number of rows if the weight is a single one of the plain model.
    """
    is_split = any(len(parts) > 1 for parts in architecture_of(model).layer.values())
    if QKV in name and is_split:
        queries = model.num_attention_heads // model.query_groups
        return model.query_groups, [queries * model.head_dim, model.head_dim, model.head_dim]
    if FC1 in name and is_split:
        return 1, [model.ffn_size, model.ffn_size]
    return 1, [rows]


def split(name: str, weight: Tensor, model: ModelConfig) -> Sequence[Tensor]:
    """Return the plain model's weights that the weight of that global name consists of."""
    groups, sizes = _layout(name, weight.shape[0], model)
    if len(sizes) == 1:
        return [weight]
    return [part.flatten(0, 1) for part in weight.unflatten(0, (groups, sum(sizes))).split(sizes, 1)]


def fuse(name: str, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Return the weight of that global name, made of the plain model's weights: the inverse of `split`."""
    if len(parts) == 1:
        return parts[0]
    groups, sizes = _layout(name, sum(map(len, parts)), model)
    in_groups = [part.unflatten(0, (groups, size)) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(in_groups, 1).flatten(0, 1)


def fused_rows(name: str, first: int, last: int, model: ModelConfig) -> Iterator[tuple[int, slice]]:
    """Yield rows first to last - 1 of what `fuse` returns, in order: the number of a part and a range of its rows."""
    groups, sizes = _layout(name, last, model)
    position = 0
    for group in range(groups):
        for part, size in enumerate(sizes):
            begin, end = max(first, position), min(last, position + size)
            if begin < end:
                offset = group * size - position
                yield part, slice(begin + offset, end + offset)
            position += size
