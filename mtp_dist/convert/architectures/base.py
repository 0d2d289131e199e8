"""What the conversion needs of an architecture: its keys in config.json and the names of its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from mtp_dist.config import ModelConfig

Size = Annotated[int, Field(gt=0, lt=2**31)]


class ConfigKeys(BaseModel):
    """The keys of config.json that define what a model computes, with transformers' defaults."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_hidden_layers: Size
    vocab_size: Size
    max_position_embeddings: Size = 2048
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Size | None = None
    tie_word_embeddings: bool | None = None
    # Only the presence of these counts, or their parts are checked on their own.
    rope_scaling: Any = None
    rope_parameters: Any = None
    quantization_config: Any = None
    transformers_weights: Any = None

    def model_section(self, source: Path) -> dict[str, Any]:
        """Return the keys of mtp_dist's section `model`, except the number of layers.

        Raise CheckpointError if the rotary embeddings are not supported. source: the folder, for the message.
        """
        return {
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "ffn_hidden_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "tie_embeddings": bool(self.tie_word_embeddings),
        }

    def unsupported(self) -> dict[str, str | None]:
        """Return, by key, why mtp_dist does not support its value, or None if it does."""
        return {
            "quantization_config": None
            if self.quantization_config is None
            else "only weights in floating point can be imported",
            "transformers_weights": None
            if self.transformers_weights is None
            else "only weights in model.safetensors, or in the files of its index, can be imported",
        }


@dataclass(frozen=True)
class Architecture:
    """A class of transformers whose models are imported and exported."""

    name: str
    """Name of the class, as in `architectures` of config.json."""
    title: str
    """Name in messages."""
    model_type: str
    """The key of config.json by which transformers selects the class."""
    keys: type[ConfigKeys]
    computes: Callable[[ModelConfig], bool]
    """Whether a model of this class computes what the section `model` defines."""
    config_json: Callable[[ModelConfig], dict[str, Any]]
    """The keys of config.json that depend on the architecture."""
    embedding: str
    """Name of the embedding's weight."""
    layers: str
    """Name of the list of layers."""
    layer: Mapping[str, tuple[str, ...]]
    """Modules in a layer whose weights, and biases, each module of one of mtp_dist's layers consists of."""
    final_norm: str
    """Name of the module."""
    unembedding: str
    """Name of the weight."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Other names that files have for a weight, with its name here."""
    buffers: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of the names of tensors in files which transformers computes from config.json instead."""

    def layer_parts(self, number: int, name: str, layers: str | None = None) -> tuple[str, ...]:
        """Return the names of the weights that a layer's weight of that name consists of.

        layers: name of the list of layers, by default the model's own.
        """
        module, _, kind = name.rpartition(".")
        return tuple(f"{layers or self.layers}.{number}.{part}.{kind}" for part in self.layer[module])

    def has_part(self, name: str) -> bool:
        """Return whether a layer's weight of that name is one of the architecture, not of a low-rank adapter."""
        return name.rpartition(".")[0] in self.layer
