"""The configuration of a model for generation, as transformers needs it."""

from typing import Any

from transformers import LlamaConfig

from mtp_dist.config import Config, HeadsConfig
from mtp_dist.convert.to_huggingface import plain_config
from mtp_dist.inference.attention import GROUPED_SDPA


class MTPConfig(LlamaConfig):
    """The configuration of a Llama, which is the trunk with head 1, and of the other prediction heads."""

    model_type = "mtp_dist"
    mtp_heads: dict[str, Any] | None = None
    """The section `heads` of the run, as JSON."""
    trunk_layers: int = 0
    """Number of the Llama's layers that belong to the trunk; the others are head 1's."""

    @property
    def heads(self) -> HeadsConfig:
        """The section `heads` of the run."""
        return HeadsConfig.model_validate(self.mtp_heads or {"count": 1})


def generation_model_config(config: Config, end_of_document: int, dtype: str) -> MTPConfig:
    """Return the configuration of a trained model. dtype: fp32 or bf16."""
    keys = plain_config(config, end_of_document, dtype)
    del keys["architectures"], keys["model_type"]
    result = MTPConfig(
        **keys,
        pad_token_id=end_of_document,
        mtp_heads=config.heads.model_dump(mode="json"),
        trunk_layers=config.model.trunk_layers,
    )
    result._attn_implementation = GROUPED_SDPA
    return result
