"""Models whose layers are probed: what a probe needs of a model that was trained here, and of any other one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtp_dist.config.schema import SourceConfig
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.model.targets import MicroBatch

EMBEDDING, FINAL_NORM = "embedding", "final norm"


def layer_name(index: int) -> str:
    """Return the name of the states after that many transformer layers."""
    return f"layer {index}" if index else EMBEDDING


class LayerStates(NamedTuple):
    """States of a model's layers on a batch, and its predictions."""

    states: dict[str, Tensor]
    """States `[B, S, D]` by the name of the layer that they come from, in the order of the computation."""
    logits: Iterator[Tensor]
    """The model's own predictions `[B, S, V]`, by distance."""


class LayeredModel(Protocol):
    """A causal language model with the states of its layers."""

    @property
    def folder(self) -> Path: ...

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def sources(self) -> Sequence[SourceConfig]:
        """Sources of its training samples, if known."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def distances(self) -> Sequence[int]:
        """Distances at which the model itself predicts."""

    @property
    def lookahead(self) -> int:
        """Number of tokens after a window that are read as labels."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a window of the text."""

    @property
    def num_layers(self) -> int:
        """Number of transformer layers before the heads."""

    @property
    def output_layer(self) -> str:
        """Name of the states that the heads read."""

    def windows(self, tokens: NDArray[np.integer], limit: int) -> list[MicroBatch]:
        """Return batches of consecutive windows, in all about `limit` positions. Raise DataError if there is none."""

    def layer_states(self, batch: MicroBatch) -> LayerStates:
        """Return the states of all layers, without gradients."""
