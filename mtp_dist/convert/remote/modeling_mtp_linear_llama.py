"""A Llama with a matrix in front of the final norm: head 1 of a model with linear heads."""

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class MtpLinearLlamaConfig(LlamaConfig):
    """The configuration of a Llama. Its own type, so that no program computes a plain Llama with it."""

    model_type = "mtp_linear_llama"


class LinearThenNorm(LlamaRMSNorm):
    """A matrix, then the norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.linear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(self.linear(hidden_states))


class MtpLinearLlamaModel(LlamaModel):
    config_class = MtpLinearLlamaConfig

    def __init__(self, config: MtpLinearLlamaConfig) -> None:
        super().__init__(config)
        self.norm = LinearThenNorm(config)


class MtpLinearLlamaForCausalLM(LlamaForCausalLM):
    config_class = MtpLinearLlamaConfig

    def __init__(self, config: MtpLinearLlamaConfig) -> None:
        super().__init__(config)
        self.model.norm = LinearThenNorm(config)
