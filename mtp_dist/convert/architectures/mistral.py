"""Mistral, a Llama whose attention may see only a window of positions."""

from dataclasses import replace

from mtp_dist.convert.architectures.base import Size
from mtp_dist.convert.architectures.llama import LLAMA, LlamaKeys


class MistralKeys(LlamaKeys):
    """The keys of a MistralForCausalLM."""

    max_position_embeddings: Size = 131072
    num_key_value_heads: Size | None = 8
    sliding_window: Size | None = 4096


MISTRAL = replace(LLAMA, name="MistralForCausalLM", title="Mistral", model_type="mistral", keys=MistralKeys)
