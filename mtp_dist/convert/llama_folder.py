"""Reading a Hugging Face folder: which model is in it, and its weights one by one. No code from it runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_dist.config import ConfigError
from mtp_dist.convert.rope import rope_from_llama

REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "MistralForCausalLM": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
"""What transformers takes for a key that a config.json lacks, where it is not None; of each architecture that maps."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LlamaFolder:
    """A folder with a Llama, or a model that computes the same."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where it has none, or one with a part that ours have not."""
        self.path = path
        if not path.is_dir():
            raise ConfigError(f"--from = '{path}' is not a folder: give one with config.json and model.safetensors")
        self.values = self._read_values()
        self._check_parts()
        self.rope = rope_from_llama(self.values, path)
        self.homes = self._find_weights()

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--from = '{self.path}': {name} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"--from = '{self.path}': {name} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"--from = '{self.path}': {name} is not a JSON object")
        return values

    def _read_values(self) -> dict[str, Any]:
        """What config.json says, with its defaults."""
        raw = self._read_json("config.json")
        values = {key: value for key, value in raw.items() if value is not None}
        architectures = values.get("architectures") or [values.get("model_type", "no architecture")]
        if architectures[0] not in DEFAULTS:
            biased = ", whose attention has biases" if str(architectures[0]).startswith("Qwen2") else ""
            raise ConfigError(
                f"--from = '{self.path}' has a {architectures[0]}{biased}: only {' and '.join(DEFAULTS)} map to ours"
            )
        defaults = {key: value for key, value in DEFAULTS[architectures[0]].items() if key not in raw}
        if missing := [key for key in REQUIRED if not isinstance(values.get(key), int)]:
            raise ConfigError(f"--from = '{self.path}': config.json lacks {', '.join(missing)}")
        return defaults | values

    def _check_parts(self) -> None:
        """Raise ConfigError for what a Llama may have and ours have not."""
        values = self.values
        head_dim = values["hidden_size"] / values["num_attention_heads"]
        faults = {
            "attention_bias": values.get("attention_bias", False) and "our attention has no biases",
            "mlp_bias": values.get("mlp_bias", False) and "our MLP has no biases",
            "sliding_window": "sliding_window" in values and "our attention sees all earlier positions",
            "hidden_act": values.get("hidden_act", "silu") != "silu" and "our MLP is SwiGLU, which has silu",
            "head_dim": values.get("head_dim", head_dim) != head_dim
            and f"ours is hidden_size / num_attention_heads = {head_dim:g}",
            "quantization_config": "quantization_config" in values and "only weights in floating point can be imported",
            "partial_rotary_factor": values.get("partial_rotary_factor", 1) != 1
            and "our rotary embeddings turn all channels",
        }
        for key, why in faults.items():
            if why:
                raise ConfigError(f"--from = '{self.path}' has {key} = {values[key]!r} in config.json: {why}")

    @property
    def layers(self) -> int:
        return self.values["num_hidden_layers"]

    @property
    def vocab_size(self) -> int:
        return self.values["vocab_size"]

    @property
    def positions(self) -> int:
        """Tokens of the longest text that it was trained on."""
        return self.values["max_position_embeddings"]

    @property
    def model(self) -> dict[str, Any]:
        """The keys of our section `model`, but for the number of layers."""
        values = self.values
        return {
            "hidden_size": values["hidden_size"],
            "num_attention_heads": values["num_attention_heads"],
            "num_query_groups": values.get("num_key_value_heads", values["num_attention_heads"]),
            "ffn_hidden_size": values["intermediate_size"],
            "vocab_size": values["vocab_size"],
            **self.rope,
            "norm_eps": float(values["rms_norm_eps"]),
            "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        }

    def _find_weights(self) -> dict[str, str]:
        """Which weight is in which file."""
        if (self.path / "model.safetensors.index.json").exists():
            homes = self._read_json("model.safetensors.index.json").get("weight_map")
            if not isinstance(homes, dict):
                raise ConfigError(f"--from = '{self.path}': model.safetensors.index.json has no weight_map")
            return homes
        if (self.path / "model.safetensors").exists():
            with self._open("model.safetensors") as file:
                return dict.fromkeys(file.keys(), "model.safetensors")
        if pickles := sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern)):
            raise ConfigError(
                f"--from = '{self.path}' has its weights as a pickle, {pickles[0]}, which can run any code when it is "
                "opened: save the model as safetensors first"
            )
        raise ConfigError(f"--from = '{self.path}' has no weights: model.safetensors is missing")

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, "pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"--from = '{self.path}': {name} cannot be read: {error}") from None

    def check_names(self, needed: Sequence[str]) -> None:
        """Raise ConfigError where a weight is missing, or where there is one that has no place in our model."""
        if missing := [name for name in needed if name not in self.homes]:
            raise ConfigError(f"--from = '{self.path}' lacks {len(missing)} weights, the first is {missing[0]}")
        # Some folders have what can be computed (frequencies), or tied weights twice.
        known = {*needed, "lm_head.weight"}
        unknown = [name for name in self.homes if name not in known and not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise ConfigError(f"--from = '{self.path}' has weights that our model has not, such as {unknown[0]}")

    def read(self, name: str) -> Tensor:
        """In fp32. Raises ConfigError where its file is damaged, or it is not in floating point."""
        with self._open(self.homes[name]) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise ConfigError(f"--from = '{self.path}': {name} cannot be read: {error}") from None
        if tensor.dtype not in FLOATS:
            raise ConfigError(f"--from = '{self.path}': {name} is {tensor.dtype}: only floating point can be imported")
        return tensor.float()
