"""A Llama whose folder also has MTP layers, with which `generate(use_mtp=True)` of transformers drafts."""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class MtpLlamaConfig(LlamaConfig):
    """The configuration of a Llama, with `num_mtp_layers`, which vLLM calls `num_nextn_predict_layers`."""

    attribute_map = {"num_nextn_predict_layers": "num_mtp_layers"}  # noqa: RUF012, as transformers declares it


class MtpLlamaModel(LlamaModel):
    config_class = MtpLlamaConfig

    def __init__(self, config: MtpLlamaConfig) -> None:
        super().__init__(config)
        leave_out_mtp_layers(self)


class MtpLlamaForCausalLM(LlamaForCausalLM):
    config_class = MtpLlamaConfig

    def __init__(self, config: MtpLlamaConfig) -> None:
        super().__init__(config)
        leave_out_mtp_layers(self)


def leave_out_mtp_layers(model: Any) -> None:
    """Set the patterns of weights that are not loaded with the model: transformers finds the MTP layers by them."""
    first, count = model.config.num_hidden_layers, model.config.num_mtp_layers
    patterns = {rf"model\.layers\.{number}\." for number in range(first, first + count)}
    model._keys_to_ignore_on_load_unexpected |= patterns
