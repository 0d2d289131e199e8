"""Reading a Hugging Face folder with a Llama: its configuration and which of its weights an import needs."""

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch

from mtp_dist.convert.llama_config import read_llama_config
from mtp_dist.convert.saved_heads import HEADS
from mtp_dist.convert.weight_folder import WeightFolder
from mtp_dist.errors import CheckpointError

EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"


class LlamaFolder(WeightFolder):
    """A folder with a Llama or a Mistral without a window."""

    def __init__(self, path: Path) -> None:
        """Raise CheckpointError if there is no such model, or one with a part that mtp_dist does not support."""
        if not path.is_dir():
            raise CheckpointError(f"--from = '{path}' is not a folder: give one with config.json and model.safetensors")
        if (path / ADAPTER).exists():
            raise CheckpointError(
                f"--from = '{path}' has a PEFT adapter, {ADAPTER}, which transformers adds to the weights: merge it "
                "(merge_and_unload) and save the result, or remove it"
            )
        self.config, self._rope = read_llama_config(path)
        super().__init__(path)
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

    def _check_sizes(self) -> None:
        """Raise CheckpointError if config.json and the weights differ in size, before allocating that much memory."""
        config, last = self.config, f"model.layers.{self.config.num_hidden_layers - 1}.input_layernorm.weight"
        if last not in self.shapes:
            raise CheckpointError(
                f"{self.label} has num_hidden_layers = {config.num_hidden_layers} in config.json, but lacks {last}"
            )
        sizes = {
            EMBEDDING: (config.vocab_size, config.hidden_size),
            "model.layers.0.mlp.gate_proj.weight": (config.intermediate_size, config.hidden_size),
        }
        self.check_shapes({name: shape for name, shape in sizes.items() if name in self.shapes})

    def unused(self, needed: Set[str]) -> Iterator[str]:
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
                raise CheckpointError(f"{self.label} has weights that mtp_dist does not support, such as {name}")
        for path in sorted(self.path.glob("*.safetensors")):
            if path.name not in (*self.files, HEADS):
                yield f"{path.name} (transformers does not read it either)"

    def _check_tied(self) -> str:
        """Return why a tied weight is unused. Raise CheckpointError if it differs: transformers 5 would untie it."""
        if not torch.equal(self.read(UNEMBEDDING).float(), self.read(EMBEDDING).float()):
            raise CheckpointError(
                f"{self.label} has tie_word_embeddings = True in config.json, but {UNEMBEDDING} differs from "
                f"{EMBEDDING}: set it to false, or remove {UNEMBEDDING} if the two are meant to be tied"
            )
        return f"tied: it equals {EMBEDDING}"
