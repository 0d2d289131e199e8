"""A trained model whose heads can be run and differentiated one by one, and the windows of a text that it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_dist.analysis.layer_states import FINAL_NORM, LayerStates, layer_name
from mtp_dist.checkpoint.manifest import ProgressCallback
from mtp_dist.config import Config, HeadsConfig
from mtp_dist.config.schema import SourceConfig
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import CheckpointError, DataError
from mtp_dist.inference.loading import read_full_weights
from mtp_dist.model.reference import ReferenceModel
from mtp_dist.model.targets import MicroBatch, document_ids, head_targets

TOKENS_PER_BATCH = 4096


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint or an export in plain PyTorch, fp32, on the GPU if there is one."""

    folder: Path
    network: ReferenceModel
    tokenizer: Tokenizer
    device: torch.device

    @classmethod
    def open(cls, folder: Path, on_verified: ProgressCallback = lambda done, total: None) -> TrainedModel:
        """Open a checkpoint, an export or a run with the errors of `read_full_weights`."""
        read = read_full_weights(folder, on_verified)
        if read.config.heads.weighted_hidden_states:
            raise CheckpointError(
                f"--model = '{folder}' has heads.weighted_hidden_states, so that its later heads read more than the "
                "trunk's output, which this analysis starts from: give a model that was trained without"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = ReferenceModel(read.config, {name: weight.float() for name, weight in read.weights}).to(device)
        return cls(folder, network.requires_grad_(False), read.tokenizer, device)

    @property
    def config(self) -> Config:
        return self.network.config

    @property
    def heads(self) -> HeadsConfig:
        return self.config.heads

    @property
    def sources(self) -> Sequence[SourceConfig]:
        return self.config.data.train

    @property
    def sequence_length(self) -> int:
        return self.config.train.sequence_length

    @property
    def lookahead(self) -> int:
        return self.heads.lookahead

    @property
    def distances(self) -> Sequence[int]:
        return self.heads.distances

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_layers(self) -> int:
        return self.config.model.trunk_layers

    @property
    def output_layer(self) -> str:
        return layer_name(self.num_layers)

    @property
    def name(self) -> str:
        return self.folder.name

    def check_predicts_ahead(self) -> None:
        """Raise CheckpointError unless heads predict further tokens without reading those in between."""
        if self.heads.count == 1:
            raise CheckpointError(
                f"--model = '{self.folder}' has one head: the losses of further heads are compared with its loss, give "
                "a model that was trained with heads.count > 1"
            )
        if self.heads.reads_drafts:
            key = "kind" if self.heads.traits.embeds_tokens else "condition"
            raise CheckpointError(
                f"--model = '{self.folder}' has heads.{key} = '{getattr(self.heads, key)}': its heads read the tokens "
                "before their target, so that no head predicts past an unknown token: give a model with other heads"
            )

    def trunk(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the trunk's output z `[B, S, D]` and the attention mask, which the heads need too."""
        states, mask = self._trunk_states(batch)
        return states[-1], mask

    def _trunk_states(self, batch: MicroBatch) -> tuple[list[Tensor], Tensor]:
        length = batch.targets.shape[-1]
        across = self.config.data.attention_across_documents
        documents = None if across or batch.documents is None else batch.documents[:, :length]
        mask = self.network.attention_mask(batch.samples[:, :length], documents)
        with torch.no_grad():
            return self.network.trunk_states(batch.samples[:, :length], mask), mask

    def layer_states(self, batch: MicroBatch) -> LayerStates:
        """Return the states of the embedding, of every trunk layer, and of head 1 after the final norm."""
        states, mask = self._trunk_states(batch)
        named = {layer_name(index): state for index, state in enumerate(states)}
        last = None if self.heads.traits.reads == "next head" else 1
        hidden = self.network.pre_norm_hidden(states[-1], batch.samples, mask, last)[1]
        named[FINAL_NORM] = self.network.final_norm(hidden)
        return LayerStates(named, self.head_logits(states[-1], batch, mask))

    def windows(self, tokens: NDArray[np.integer], limit: int) -> list[MicroBatch]:
        """Return batches of consecutive windows with the targets of every head, in all about `limit` positions.

        The windows are those of the training: window w has the positions w * S to w * S + S - 1 of the text. Raise
        DataError if the text is shorter than one window.
        """
        length, lookahead = self.sequence_length, self.heads.lookahead
        count = min((len(tokens) - lookahead) // length, max(1, limit // length))
        if count < 1:
            raise DataError(
                f"--data has {len(tokens)} tokens, fewer than one window of '{self.folder}' needs, "
                f"train.sequence_length + heads = {length} + {lookahead}: give a longer text"
            )
        text = torch.as_tensor(tokens[: count * length + lookahead].astype(np.int64), device=self.device)
        samples = text.unfold(0, length + lookahead, length)
        documents = document_ids(samples, self.tokenizer.end_of_document)
        bounds = None if self.config.data.loss_across_documents else documents
        targets = head_targets(samples, self.heads.distances, length, bounds)
        size = max(1, TOKENS_PER_BATCH // length)
        parts = zip(samples.split(size), targets.split(size, 1), documents.split(size), strict=True)
        return [MicroBatch(*part) for part in parts]

    def head_logits(self, z: Tensor, batch: MicroBatch, mask: Tensor) -> Iterator[Tensor]:
        """Yield the logits `[B, S, V]` of head 1, head 2, ... for the trunk's output z."""
        hidden = self.network.pre_norm_hidden(z, batch.samples, mask)
        for k in range(1, self.heads.count + 1):
            yield self.network.head_logits(k, hidden[k], batch.samples)
