"""Reading a Hugging Face folder with a model: its configuration and which of its weights an import needs."""

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch

from mtp_dist.convert.config_json import read_config_json
from mtp_dist.convert.saved_heads import HEADS
from mtp_dist.convert.weight_folder import WeightFolder
from mtp_dist.errors import CheckpointError

ADAPTER = "adapter_config.json"


class HuggingFaceFolder(WeightFolder):
    """A folder with a model of one of the supported architectures."""

    def __init__(self, path: Path) -> None:
        """Raise CheckpointError if there is no such model, or one with a part that mtp_dist does not support."""
        if not path.is_dir():
            raise CheckpointError(f"--from = '{path}' is not a folder: give one with config.json and model.safetensors")
        if (path / ADAPTER).exists():
            raise CheckpointError(
                f"--from = '{path}' has a PEFT adapter, {ADAPTER}, which transformers adds to the weights: merge it "
                "(merge_and_unload) and save the result, or remove it"
            )
        self.architecture, self.config = read_config_json(path)
        self.model: dict[str, Any] = self.config.model_section(path)
        """The keys of mtp_dist's section `model`, except the number of layers."""
        super().__init__(path, renamed=self.architecture.renamed)
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Raise CheckpointError if config.json and the weights differ in size, before allocating that much memory."""
        config, architecture = self.config, self.architecture
        [last] = architecture.layer_parts(config.num_hidden_layers - 1, "input_layernorm.weight")
        if last not in self.shapes:
            raise CheckpointError(
                f"{self.label} has num_hidden_layers = {config.num_hidden_layers} in config.json, but lacks {last}"
            )
        sizes = {
            architecture.embedding: (config.vocab_size, config.hidden_size),
            architecture.layer_parts(0, "mlp.linear_fc1.weight")[0]: (config.intermediate_size, config.hidden_size),
        }
        self.check_shapes({name: shape for name, shape in sizes.items() if name in self.shapes})

    def unused(self, needed: Set[str]) -> Iterator[str]:
        """Yield what the folder contains and the import leaves out, each with the reason.

        Raise CheckpointError for a weight that mtp_dist does not support.
        """
        for name in self.weight_map:
            if name in needed:
                continue
            if name == self.architecture.unembedding:
                yield f"{name} ({self._check_tied()})"
            elif name.endswith(self.architecture.buffers):
                yield f"{name} (computed from config.json)"
            else:
                raise CheckpointError(f"{self.label} has weights that mtp_dist does not support, such as {name}")
        for path in sorted(self.path.glob("*.safetensors")):
            if path.name not in (*self.files, HEADS):
                yield f"{path.name} (transformers does not read it either)"

    def _check_tied(self) -> str:
        """Return why a tied weight is unused. Raise CheckpointError if it differs: transformers 5 would untie it."""
        unembedding, embedding = self.architecture.unembedding, self.architecture.embedding
        if not torch.equal(self.read(unembedding).float(), self.read(embedding).float()):
            raise CheckpointError(
                f"{self.label} has tie_word_embeddings = True in config.json, but {unembedding} differs from "
                f"{embedding}: set it to false, or remove {unembedding} if the two are meant to be tied"
            )
        return f"tied: it equals {embedding}"
