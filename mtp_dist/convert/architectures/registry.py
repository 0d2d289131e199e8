"""The architectures by name, and the choice of the one that a model is exported as."""

from mtp_dist.config import ModelConfig
from mtp_dist.convert.architectures.base import Architecture
from mtp_dist.convert.architectures.gpt_neox import GPT_NEOX
from mtp_dist.convert.architectures.llama import LLAMA
from mtp_dist.convert.architectures.mistral import MISTRAL
from mtp_dist.convert.architectures.qwen2 import QWEN2
from mtp_dist.convert.architectures.qwen3 import QWEN3
from mtp_dist.errors import ConfigError

ARCHITECTURES = {each.name: each for each in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX)}
"""In the order in which an export tries them."""
BUILDING_BLOCKS = (
    "kv_channels",
    "qkv_bias",
    "qk_norm",
    "normalization",
    "linear_bias",
    "rotary_percent",
    "parallel_residual",
    "mlp",
    "sliding_window",
)
"""Keys of the section `model` that decide which architecture computes a model."""


def architecture_of(model: ModelConfig) -> Architecture:
    """Return the first architecture that computes a model: the one that it is exported as.

    | | of the building blocks it has |
    | --- | --- |
    | Llama | none, or `linear_bias`; any `kv_channels` |
    | Mistral | `sliding_window`; any `kv_channels` |
    | Qwen2 | `qkv_bias`; any `kv_channels`, any `sliding_window` |
    | Qwen3 | `qk_norm`; any `kv_channels`, any `sliding_window` |
    | GPT-NeoX | `normalization: layernorm`, `mlp: gelu`, `linear_bias`; any `rotary_percent`, any `parallel_residual` |

    Raise ConfigError if none has these building blocks together.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.computes(model):
            return architecture
    fields = type(model).model_fields
    chosen = {key: getattr(model, key) for key in BUILDING_BLOCKS if getattr(model, key) != fields[key].default}
    settings = ", ".join(f"model.{key} = {value!r}" for key, value in chosen.items())
    titles = [architecture.title for architecture in ARCHITECTURES.values()]
    raise ConfigError(
        f"{settings} belong to no architecture that can be exported: {', '.join(titles[:-1])} or {titles[-1]} "
        "(docs/models.md has their building blocks)"
    )
