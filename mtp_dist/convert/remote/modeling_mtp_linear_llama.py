"""A Llama with a matrix in front of the final norm: head 1 of a model with linear heads."""

from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class MtpLinearLlamaConfig(LlamaConfig):
    """The configuration of a Llama. Its own type, so that no program computes a plain Llama with it."""

    model_type = "mtp_linear_llama"


class MtpLinearLlamaModel(LlamaModel):
    config_class = MtpLinearLlamaConfig

    def __init__(self, config: MtpLinearLlamaConfig) -> None:
        super().__init__(config)
        put_matrix_before_final_norm(self)


class MtpLinearLlamaForCausalLM(LlamaForCausalLM):
    config_class = MtpLinearLlamaConfig

    def __init__(self, config: MtpLinearLlamaConfig) -> None:
        super().__init__(config)
        put_matrix_before_final_norm(self.base_model)


def put_matrix_before_final_norm(model: Any) -> None:
    norm, size = getattr(model, "norm", None) or model.final_layer_norm, model.config.hidden_size
    norm.linear = nn.Linear(size, size, bias=False)
    norm.register_forward_pre_hook(lambda module, inputs: (module.linear(*inputs),))
