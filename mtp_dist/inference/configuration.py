"""The configuration of a model for generation, as transformers needs it."""

from typing import Any

from transformers import LlamaConfig

from mtp_dist.config import Config, HeadsConfig
from mtp_dist.convert.to_huggingface import plain_config
from mtp_dist.inference.attention import GROUPED_SDPA


class MTPConfig(LlamaConfig):
    """The configuration of trunk and head 1, a model of transformers, and of the other prediction heads."""

    model_type = "mtp_dist"
    mtp_heads: dict[str, Any] | None = None
    """The section `heads` of the run, as JSON."""
    trunk_layers: int = 0
    """Number of layers that belong to the trunk; the others of the model are head 1's."""
    backbone: str = "llama"
    """The `model_type` of the architecture."""
    sliding_window: int | None = None
    """Positions that each position attends to; all if None."""

    @property
    def heads(self) -> HeadsConfig:
        """The section `heads` of the run."""
        return HeadsConfig.model_validate(self.mtp_heads or {"count": 1})


def generation_model_config(config: Config, end_of_document: int, dtype: str) -> MTPConfig:
    """Return the configuration of a trained model. dtype: fp32 or bf16."""
    keys = plain_config(config, end_of_document, dtype)
    del keys["architectures"]
    backbone = keys.pop("model_type")
    if backbone in ("qwen2", "qwen3"):
        kind = "sliding_attention" if config.model.sliding_window else "full_attention"
        keys["layer_types"] = [kind] * keys["num_hidden_layers"]
    if backbone == "gpt_neox":
        keys |= {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    result = MTPConfig(
        **keys,
        pad_token_id=end_of_document,
        mtp_heads=config.heads.model_dump(mode="json"),
        trunk_layers=config.model.trunk_layers,
        backbone=backbone,
    )
    result._attn_implementation = GROUPED_SDPA
    return result
