"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mtp_dist.config import ModelConfig
from mtp_dist.convert.architectures.base import Size
from mtp_dist.convert.architectures.llama import LLAMA, RmsNormKeys, is_gated_and_sequential, rms_norm_keys

FULL, WINDOW = "full_attention", "sliding_attention"


class QwenKeys(RmsNormKeys):
    """The keys that Qwen2 and Qwen3 have."""

    num_key_value_heads: Size | None = 32
    max_position_embeddings: Size = 32768
    use_sliding_window: bool = False
    sliding_window: Size | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def model_section(self, source: Path) -> dict[str, Any]:
        return super().model_section(source) | {"sliding_window": self._window if WINDOW in self._types() else None}

    @property
    def _window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def _types(self) -> set[str]:
        """Return what the layers attend to."""
        if self.layer_types is not None:
            return set(self.layer_types)
        if self._window is None or self.max_window_layers >= self.num_hidden_layers:
            return {FULL}
        return {WINDOW} if self.max_window_layers <= 0 else {FULL, WINDOW}

    def unsupported(self) -> dict[str, str | None]:
        types = self._types()
        partial = None
        if len(types) != 1 or types - {FULL, WINDOW}:
            partial = "a window is supported if all layers have it"
        elif types == {WINDOW} and not self._window:
            partial = "layers have a window, but use_sliding_window and sliding_window give no size"
        key = "max_window_layers" if self.layer_types is None else "layer_types"
        return super().unsupported() | {key: partial}


class Qwen2Keys(QwenKeys):
    """The keys of a Qwen2ForCausalLM."""

    def model_section(self, source: Path) -> dict[str, Any]:
        return super().model_section(source) | {"qkv_bias": True}


def is_qwen2(model: ModelConfig) -> bool:
    return is_gated_and_sequential(model) and not model.qk_norm and model.qkv_bias and not model.linear_bias


def qwen_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json of a Qwen2 or Qwen3."""
    if model.sliding_window is None:
        return rms_norm_keys(model) | {"use_sliding_window": False, "sliding_window": None}
    window = {"use_sliding_window": True, "sliding_window": model.sliding_window, "max_window_layers": 0}
    return rms_norm_keys(model) | window


def qwen2_keys(model: ModelConfig) -> dict[str, Any]:
    keys = qwen_keys(model)
    if model.attention_size == model.hidden_size:
        del keys["head_dim"]  # which a Qwen2 usually does not have
    return keys


QWEN2 = replace(
    LLAMA,
    name="Qwen2ForCausalLM",
    title="Qwen2",
    model_type="qwen2",
    keys=Qwen2Keys,
    computes=is_qwen2,
    config_json=qwen2_keys,
)
