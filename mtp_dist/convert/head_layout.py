"""Places of the heads' weights in an export for transformers: the model's own files, or a file next to them.

| architecture | in the model's files | other heads draft by |
| --- | --- | --- |
| LlamaForCausalLM and other plain ones | trunk and head 1 | custom_generate/generate.py |
| MtpLlamaForCausalLM | also the blocks of heads 2..n | `generate(use_mtp=True)` |
| MtpLinearLlamaForCausalLM and others | also head 1's matrix | custom_generate/generate.py |
"""

from collections.abc import Iterable, Iterator

import torch

from mtp_dist.config import Config
from mtp_dist.convert.architectures.llama import LLAMA
from mtp_dist.convert.architectures.registry import ARCHITECTURES, architecture_of
from mtp_dist.convert.plain_weights import plain_layers, plain_weights, split
from mtp_dist.model.parameters import head_key, parameter_shapes

MTP, LINEAR = "MtpLlamaForCausalLM", "MtpLinear"
"""The Llama with MTP layers, and what precedes the name of one with a matrix in front of the final norm."""

WeightParts = tuple[str, tuple[str, ...]]
"""A weight's global name, and the names of the model's weights that it consists of."""


def plain_name(architecture: str) -> str:
    """Return the name of the architecture that an export's is made of."""
    return LLAMA.name if architecture == MTP else architecture.removeprefix(LINEAR)


def model_type(architecture: str) -> str:
    """Return the `model_type` in config.json: the plain one if a program without remote code computes the same."""
    plain = ARCHITECTURES[plain_name(architecture)].model_type
    return f"mtp_linear_{plain}" if architecture.startswith(LINEAR) else plain


def transformers_architecture(config: Config) -> str:
    """Return the architecture of an export for transformers.

    transformers' own MTP layers have one layer each, share the unembedding and predict successive tokens. They also
    draft where `dynamic` scaling changes the rotary embedding with each token, which changes the text.
    """
    heads, plain = config.heads, architecture_of(config.model)
    if heads.kind == "linear":
        return LINEAR + plain.name
    is_mtp = heads.kind == "sequential" and heads.layers_per_head == 1 and heads.unembedding == "shared"
    is_mtp &= heads.count > 1 and plain is LLAMA and config.model.dynamic_length is None
    return MTP if is_mtp else plain.name


def model_weights(config: Config, architecture: str) -> list[WeightParts]:
    """Return the weights in the model's files, in forward order. A global name stands there once per copy of it."""
    return [*plain_weights(config).items(), *head_weights(config, architecture)]


def head_weights(config: Config, architecture: str) -> Iterator[WeightParts]:
    """Yield the weights of heads in the model's files, except what the plain model has too."""
    if architecture.startswith(LINEAR):
        final_norm = ARCHITECTURES[plain_name(architecture)].final_norm
        yield "heads.1.linear.weight", (f"{final_norm}.linear.weight",)
    if architecture != MTP:
        return
    shapes = parameter_shapes(config)
    for number, head in enumerate(range(2, config.heads.count + 1), len(plain_layers(config))):
        block, layer = f"heads.{head_key(config.heads, head)}", f"model.layers.{number}"
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
            yield f"{block}.{name}", (f"{layer}.{name}",)
        prefix = f"{block}.layers.0."
        for name in (each.removeprefix(prefix) for each in shapes if each.startswith(prefix)):
            yield f"{prefix}{name}", LLAMA.layer_parts(number, name)
        yield "final_norm.weight", (f"{layer}.shared_head.norm.weight",)


def part_shapes(config: Config, weights: Iterable[WeightParts]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's weights by name."""
    shapes = parameter_shapes(config)
    return {
        part: tuple(tensor.shape)
        for name, parts in weights
        for part, tensor in zip(parts, split(name, torch.empty(shapes[name], device="meta"), config.model), strict=True)
    }
