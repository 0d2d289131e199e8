"""What the conversion needs of an architecture: its keys in config.json and the names of its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from mtp_dist.config import Config
from mtp_dist.convert.rope import read_rope

Size = Annotated[int, Field(gt=0, lt=2**31)]


class ConfigKeys(BaseModel):
    """The keys of config.json that define what a model computes, with transformers' defaults."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_hidden_layers: Size
    vocab_size: Size
    head_dim: Size | None = None
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
            **read_rope(self.model_dump(), source),
            "tie_embeddings": bool(self.tie_word_embeddings),
        }

    def unsupported(self) -> dict[str, str | None]:
        """Return why mtp_dist does not support the value of a key, or None if it does."""
        head_dim = self.hidden_size / self.num_attention_heads
        return {
            "head_dim": f"only hidden_size / num_attention_heads = {head_dim:g} is supported"
            if (self.head_dim or head_dim) != head_dim
            else None,
            "quantization_config": None
            if self.quantization_config is None
            else "only weights in floating point can be imported",
            "partial_rotary_factor": None
            if self.partial_rotary_factor in (None, 1)
            else "rotary embeddings of a part of the channels are not supported",
            "transformers_weights": None
            if self.transformers_weights is None
            else "only weights in model.safetensors, or in the files of its index, can be imported",
        }


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, whose models can be imported, and exported if it has `config_json`."""

    name: str
    """Name of the class, as in `architectures` of config.json."""
    title: str
    """Name in messages."""
    model_type: str
    """The key of config.json by which transformers selects the class."""
    keys: type[ConfigKeys]
    embedding: str
    """Name of the embedding's weight."""
    layers: str
    """Name of the list of layers."""
    layer: Mapping[str, tuple[str, ...]]
    """Names in a layer of the weights that each weight of one of mtp_dist's layers consists of."""
    final_norm: str
    unembedding: str
    config_json: Callable[[Config], dict[str, Any]]
    """Function that returns the keys of config.json which depend on the architecture."""

    def layer_parts(self, number: int, name: str) -> tuple[str, ...]:
        """Return the names of the weights that a layer's weight of that name consists of."""
        return tuple(f"{self.layers}.{number}.{part}" for part in self.layer[name])
