"""The parameters by their global names: which there are, their shapes and their initial values.

A global name such as `trunk.3.mlp.linear_fc1.weight` is the same at every layout, and so is the full tensor that it
names; tensor parallelism only decides which shard of it a rank holds.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mtp_dist.config import Config, HeadsConfig, LowRankConfig
from mtp_dist.config.heads import condition_rank
from mtp_dist.config.model import layer_shapes, norm_shapes
from mtp_dist.config.schema import ModelPart

STATE_WEIGHTS = "weighted_hidden_states.logits"
"""Logits of the weights of the trunk's hidden states in the sum that heads 2..n read, the embedding's output first."""
LAST_STATE_WEIGHT = 0.99
"""Initial weight of the last trunk layer's output in it; the others share the rest equally."""
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
"""Ends of the names of a low-rank adapter's matrices."""


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every full parameter by global name, in the order of the forward pass.

    `linear_qkv` has Megatron's order of rows: for each query group its queries, then its key, then its value.
    `linear_fc1` has the rows of SwiGLU's gate, then those of its other factor; without a gate only the latter. A matrix
    with a low-rank adapter is followed by its A and B, named as in peft.
    """
    model, vocab_size = config.model, config.vocab_size
    width = model.hidden_size
    layer = layer_shapes(model)
    adapted_layer = _with_adapters(layer, config.train.low_rank)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab_size, width)}
    for index in range(model.trunk_layers):
        shapes |= {f"trunk.{index}.{name}": shape for name, shape in adapted_layer.items()}
    if config.heads.weighted_hidden_states:
        shapes[STATE_WEIGHTS] = (model.trunk_layers + 1,)
    keys = (head_key(config.heads, head) for head in range(1, config.heads.count + 1))
    for key in filter(None, dict.fromkeys(keys)):
        head_shapes = _head_shapes(config, adapted_layer if key == "1" else layer)
        shapes |= {f"heads.{key}.{name}": shape for name, shape in head_shapes.items()}
    shapes |= norm_shapes("final_norm", model)
    if rank := condition_rank(config.heads, width):
        shapes["condition.embedding.weight"] = (vocab_size, rank)
        shapes |= {f"condition.{k}.weight": (width, rank) for k in range(2, config.heads.count + 1)}
    if config.heads.unembedding == "separate":
        shapes |= {f"unembeddings.{k}.weight": (vocab_size, width) for k in range(1, config.heads.count + 1)}
    elif not model.tie_embeddings:
        shapes["unembedding.weight"] = (vocab_size, width)
    if config.heads.token_order:
        shapes["token_order.weight"] = (vocab_size, width)
    return shapes


def model_part(name: str) -> ModelPart:
    """Return the part of the model, such as `heads`, to which a weight's global name belongs."""
    module, _, rest = name.partition(".")
    if module in ("heads", "unembeddings", "condition"):
        return "head_1" if rest.startswith("1.") else "heads"
    if module in ("token_order", "weighted_hidden_states"):
        return "heads"
    parts: dict[str, ModelPart] = {"embedding": "embedding", "unembedding": "unembedding"}
    return parts.get(module, "trunk")


def is_trained(config: Config, name: str) -> bool:
    """Return whether training changes the parameter of that global name."""
    return not config.train.freezes_weights or model_part(name) == "heads" or name.endswith((LORA_A, LORA_B))


def head_key(heads: HeadsConfig, head: int) -> str | None:
    """Return the name of a head's own module, None if the head is only the final norm and the unembedding."""
    if head == 1 and not heads.traits.first_head_has_block:
        return None
    return "repeated" if heads.repeated else str(head)


def _with_adapters(layer: Mapping[str, tuple[int, ...]], low_rank: LowRankConfig | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a transformer layer with those of its low-rank adapters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in layer.items():
        shapes[name] = shape
        matrix = name.removesuffix(".weight")
        if low_rank and matrix.endswith(low_rank.targets):
            shapes[f"{matrix}.{LORA_A}"] = (low_rank.rank, shape[1])
            shapes[f"{matrix}.{LORA_B}"] = (shape[0], low_rank.rank)
    return shapes


def _head_shapes(config: Config, layer: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one head's own parameters. layer: shapes of a transformer layer."""
    weights, shapes = config.heads.traits.weights, dict[str, tuple[int, ...]]()
    for name, shape in weights.items():
        if name.endswith("norm.weight"):
            shapes |= norm_shapes(name.removesuffix(".weight"), config.model)
        else:
            shapes[name] = tuple(config.model.hidden_size * size for size in shape)
    prefix = "layers." if weights else ""
    return shapes | {
        f"{prefix}{depth}.{name}": shape for depth in range(config.heads.block_layers) for name, shape in layer.items()
    }


def initial_weight(config: Config, name: str, shape: Sequence[int]) -> Tensor:
    """Return the full initial value of a parameter, fp32 on the CPU, as a function of the seed and the name only.

    Normal with `init_std`; norms are 1, biases 0; projections into the residual stream are smaller by sqrt(2 * depth)
    as in GPT-2. depth counts the trunk's layers and those of one head, also if heads are chained. The matrices of
    `heads.condition` are 0, so that a head starts without it, and so is B of a low-rank adapter, whose A is uniform as
    in peft. STATE_WEIGHTS gives the last layer LAST_STATE_WEIGHT.
    """
    if name.endswith("norm.weight"):
        return torch.ones(*shape)
    if starts_at_zero(name):
        return torch.zeros(*shape)
    if name == STATE_WEIGHTS:
        logits = torch.zeros(*shape)
        logits[-1] = math.log((len(logits) - 1) * LAST_STATE_WEIGHT / (1 - LAST_STATE_WEIGHT))
        return logits
    std = config.model.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * (config.model.trunk_layers + config.heads.layers_per_head))
    digest = hashlib.sha256(f"{config.run.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if name.endswith(LORA_A):
        bound = shape[1] ** -0.5
        return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(*shape).normal_(0.0, std, generator=generator)


def starts_at_zero(name: str) -> bool:
    """Return whether the initial value of a parameter is 0."""
    return name.endswith((LORA_B, ".bias")) or (name.startswith("condition.") and name != "condition.embedding.weight")


def named_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the local parameters of a module by global name, from each layer's `global_prefix`."""
    for layer in module.modules():
        prefix = getattr(layer, "global_prefix", None)
        if prefix is not None:
            for name, weight in layer.named_parameters():
                yield f"{prefix}.{name}".removeprefix(".").replace("embedding.lookup.", "embedding."), weight
