"""Reading `config.json` of a Hugging Face folder with a Llama."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from mtp_dist.convert.head_layout import LINEAR, MODEL_TYPES, MTP
from mtp_dist.convert.rope import rope_from_llama
from mtp_dist.errors import CheckpointError

Size = Annotated[int, Field(gt=0, lt=2**31)]


class LlamaConfig(BaseModel):
    """The keys of config.json that define what a LlamaForCausalLM computes, with transformers' defaults."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_hidden_layers: Size
    vocab_size: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size = 2048
    hidden_act: str = "silu"
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: Size | None = None
    sliding_window: Size | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    # Only the presence of these counts, or their parts are checked on their own.
    rope_scaling: Any = None
    rope_parameters: Any = None
    quantization_config: Any = None
    transformers_weights: Any = None


class MistralConfig(LlamaConfig):
    """The same keys of a MistralForCausalLM, with its defaults."""

    max_position_embeddings: Size = 131072
    num_key_value_heads: Size | None = 8
    sliding_window: Size | None = 4096


ARCHITECTURES: dict[str, tuple[str, type[LlamaConfig]]] = {
    "LlamaForCausalLM": ("llama", LlamaConfig),
    "MistralForCausalLM": ("mistral", MistralConfig),
    # Of an export for transformers, whose further weights mtp_config.json explains.
    MTP: (MODEL_TYPES[MTP], LlamaConfig),
    LINEAR: (MODEL_TYPES[LINEAR], LlamaConfig),
}
"""The model_type, by which transformers selects the class, and the configuration of each architecture."""


def read_json_object(path: Path, label: str) -> dict[str, Any]:
    """Return the content of a file. Raise CheckpointError if it is not a JSON object. label: its folder in messages."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{label}: {path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: {path.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{label}: {path.name} is not a JSON object")
    return values


def read_llama_config(source: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """Return the keys of a folder's config.json, and the rotary keys of mtp_dist's section `model`.

    Raise CheckpointError if the model is not a Llama, or has a part that mtp_dist does not support.
    """
    raw = read_json_object(source / "config.json", f"--from = '{source}'")
    config = _validated(_config_class(raw, source), raw, source)
    _check_parts(config, source)
    return config, rope_from_llama(config.model_dump(), source)


def _config_class(raw: dict[str, Any], source: Path) -> type[LlamaConfig]:
    architectures, model_type = raw.get("architectures") or [], raw.get("model_type")
    if not isinstance(architectures, list):
        raise CheckpointError(f"--from = '{source}' has architectures = {architectures!r} in config.json: not a list")
    name = str((architectures or [model_type or "no architecture"])[0])
    if name not in ARCHITECTURES:
        biased = ", whose attention has biases" if name.startswith("Qwen2") else ""
        raise CheckpointError(
            f"--from = '{source}' has a {name}{biased}: only LlamaForCausalLM and MistralForCausalLM can be imported"
        )
    expected, config_class = ARCHITECTURES[name]
    if model_type not in (None, expected):
        raise CheckpointError(
            f"--from = '{source}' has model_type = {model_type!r} in config.json, its architectures = [{name!r}] need "
            f"{expected!r}: make them agree"
        )
    return config_class


def _validated(config_class: type[LlamaConfig], raw: dict[str, Any], source: Path) -> LlamaConfig:
    required = {key for key, field in config_class.model_fields.items() if field.is_required()}
    if missing := sorted(key for key in required if raw.get(key) is None):
        raise CheckpointError(f"--from = '{source}': config.json lacks {', '.join(missing)}")
    try:
        return config_class.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, message = first["loc"][0], first["msg"]
        raise CheckpointError(
            f"--from = '{source}' has {key} = {first['input']!r} in config.json: {message[0].lower()}{message[1:]}"
        ) from None


def _check_parts(config: LlamaConfig, source: Path) -> None:
    """Raise CheckpointError for a part that a Llama may have and mtp_dist does not support."""
    head_dim = config.hidden_size / config.num_attention_heads
    faults = {
        "attention_bias": config.attention_bias and "biases of attention are not supported",
        "mlp_bias": config.mlp_bias and "biases of the MLP are not supported",
        "sliding_window": config.sliding_window and "attention to a window of positions is not supported",
        "hidden_act": config.hidden_act != "silu" and "only SwiGLU, which has silu, is supported",
        "head_dim": (config.head_dim or head_dim) != head_dim
        and f"only hidden_size / num_attention_heads = {head_dim:g} is supported",
        "quantization_config": config.quantization_config is not None
        and "only weights in floating point can be imported",
        "partial_rotary_factor": config.partial_rotary_factor not in (None, 1)
        and "rotary embeddings of a part of the channels are not supported",
        "transformers_weights": config.transformers_weights is not None
        and "only weights in model.safetensors, or in the files of its index, can be imported",
    }
    for key, why in faults.items():
        if why:
            raise CheckpointError(f"--from = '{source}' has {key} = {getattr(config, key)!r} in config.json: {why}")
