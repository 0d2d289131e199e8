"""Trunk and head 1 of each architecture for generation: transformers' own classes, all called like those of a Llama."""

from typing import Any

from torch import Tensor, nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model


class NeoXLayer(GPTNeoXLayer):
    """A layer of GPT-NeoX with the arguments and the attributes of a Llama's."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[no-untyped-call]
        attention: Any = self.attention
        attention.num_key_value_groups = 1

    @property
    def self_attn(self) -> nn.Module:
        return self.attention

    def forward(self, hidden: Tensor, cache: Any = None, layer_past: Any = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(hidden, layer_past=layer_past if cache is None else cache, **kwargs)


class NeoXModel(GPTNeoXModel):
    """GPT-NeoX with the attributes of a Llama."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(NeoXLayer(config, number) for number in range(config.num_hidden_layers))
        self.embed_tokens: Any = self._modules.pop("embed_in")
        self.norm: Any = self._modules.pop("final_layer_norm")

    @property
    def embed_in(self) -> Any:  # type: ignore[override]
        return self.embed_tokens

    @property
    def final_layer_norm(self) -> Any:  # type: ignore[override]
        return self.norm


BACKBONES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "llama": (LlamaModel, LlamaDecoderLayer),
    "mistral": (MistralModel, MistralDecoderLayer),
    "qwen2": (Qwen2Model, Qwen2DecoderLayer),
    "qwen3": (Qwen3Model, Qwen3DecoderLayer),
    "gpt_neox": (NeoXModel, NeoXLayer),
}
"""The model and the layer by the `model_type` of the architecture."""


def new_norm(config: Any) -> nn.Module:
    """Return a norm of the kind that the architecture has."""
    if config.backbone == "gpt_neox":
        return nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
    return LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
