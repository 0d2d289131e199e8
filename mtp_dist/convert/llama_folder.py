"""Reading a Hugging Face folder with a Llama: its configuration, and its weights one by one. No code from it runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtp_dist.convert.llama_config import read_json_object, read_llama_config
from mtp_dist.convert.saved_heads import HEADS
from mtp_dist.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LlamaFolder:
    """A folder with a Llama or a Mistral without a window. Its weights are those that transformers would read."""

    def __init__(self, path: Path) -> None:
        """Raise CheckpointError if there is no such model, or one with a part that mtp_dist does not support."""
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"--from = '{path}' is not a folder: give one with config.json and model.safetensors")
        if (path / ADAPTER).exists():
            raise CheckpointError(
                f"--from = '{path}' has a PEFT adapter, {ADAPTER}, which transformers adds to the weights: merge it "
                "(merge_and_unload) and save the result, or remove it"
            )
        self.config, self._rope = read_llama_config(path)
        self.files = self._weight_files()
        self.weight_map: dict[str, str] = {}
        self.shapes: dict[str, list[int]] = {}
        self._read_headers()
        self._check_sizes()

    @property
    def model(self) -> dict[str, Any]:
        """The keys of mtp_dist's section `model`, except the number of layers."""
        config = self.config
        return {
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads or config.num_attention_heads,
            "ffn_hidden_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            **self._rope,
            "norm_eps": config.rms_norm_eps,
            "tie_embeddings": bool(config.tie_word_embeddings),
        }

    def _weight_files(self) -> list[str]:
        """Return the files that transformers reads: the single file, or else all files that an index names."""
        if (self.path / SINGLE).exists():
            return [SINGLE]
        if (self.path / INDEX).exists():
            return self._indexed_files()
        if pickles := sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern)):
            raise CheckpointError(
                f"--from = '{self.path}' has its weights as a pickle, {pickles[0]}, which can run any code when it is "
                "opened: save the model as safetensors first"
            )
        raise CheckpointError(f"--from = '{self.path}' has no weights: {SINGLE} is missing")

    def _indexed_files(self) -> list[str]:
        weight_map = read_json_object(self.path / INDEX, self.path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"--from = '{self.path}': {INDEX} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
                raise CheckpointError(
                    f"--from = '{self.path}': {INDEX} names {file!r}, which is not a file of this folder, for {name}"
                )
        return sorted(set(weight_map.values()))

    def _read_headers(self) -> None:
        """List the tensors of all files, whichever file the index names for them, as transformers does."""
        for file in self.files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118, not a dict
                    if name in self.weight_map:
                        raise CheckpointError(
                            f"--from = '{self.path}' has {name} in {self.weight_map[name]} and in {file}: remove one"
                        )
                    self.weight_map[name] = file
                    self.shapes[name] = opened.get_slice(name).get_shape()

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, "pt")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"--from = '{self.path}': {name} cannot be read: {error}") from None

    def _check_sizes(self) -> None:
        """Raise CheckpointError if config.json and the weights differ in size, before allocating that much memory."""
        config, last = self.config, f"model.layers.{self.config.num_hidden_layers - 1}.input_layernorm.weight"
        if last not in self.shapes:
            raise CheckpointError(
                f"--from = '{self.path}' has num_hidden_layers = {config.num_hidden_layers} in config.json, but lacks "
                f"{last}"
            )
        sizes = {
            EMBEDDING: (config.vocab_size, config.hidden_size),
            "model.layers.0.mlp.gate_proj.weight": (config.intermediate_size, config.hidden_size),
        }
        self.check_shapes({name: shape for name, shape in sizes.items() if name in self.shapes})

    def check_shapes(self, needed: Mapping[str, Sequence[int]]) -> None:
        """Raise CheckpointError if a weight is missing or has another shape."""
        if missing := [name for name in needed if name not in self.shapes]:
            raise CheckpointError(f"--from = '{self.path}' lacks {len(missing)} weights, the first is {missing[0]}")
        for name, shape in needed.items():
            if self.shapes[name] != list(shape):
                raise CheckpointError(
                    f"--from = '{self.path}' has {name} as {self.shapes[name]}, its config.json requires {list(shape)}"
                )

    def unused(self, needed: Mapping[str, object]) -> Iterator[str]:
        """Yield what the folder contains and the import leaves out, each with the reason.

        Raise CheckpointError for a weight that mtp_dist does not support.
        """
        for name in self.weight_map:
            if name in needed:
                continue
            if name == UNEMBEDDING:
                yield f"{name} ({self._check_tied()})"
            elif name.endswith("rotary_emb.inv_freq"):
                yield f"{name} (computed from config.json)"
            else:
                raise CheckpointError(
                    f"--from = '{self.path}' has weights that mtp_dist does not support, such as {name}"
                )
        for path in sorted(self.path.glob("*.safetensors")):
            if path.name not in (*self.files, HEADS):
                yield f"{path.name} (transformers does not read it either)"

    def _check_tied(self) -> str:
        """Return why a tied weight is unused. Raise CheckpointError if it differs: transformers 5 would untie it."""
        if not torch.equal(self.read(UNEMBEDDING), self.read(EMBEDDING)):
            raise CheckpointError(
                f"--from = '{self.path}' has tie_word_embeddings = True in config.json, but {UNEMBEDDING} differs from "
                f"{EMBEDDING}: set it to false, or remove {UNEMBEDDING} if the two are meant to be tied"
            )
        return f"tied: it equals {EMBEDDING}"

    def read(self, name: str) -> Tensor:
        """Return a weight in fp32. Raise CheckpointError if its file is corrupt, or it is not in floating point."""
        with self._open(self.weight_map[name]) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"--from = '{self.path}': {name} cannot be read: {error}") from None
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"--from = '{self.path}': {name} is {tensor.dtype}: only floating point can be imported"
            )
        return tensor.float()
