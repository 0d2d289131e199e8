"""Models that predict the next token: any causal language model of Hugging Face, and the first head of ours."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mtp_dist.analysis.layer_states import FINAL_NORM, LayerStates, layer_name
from mtp_dist.checkpoint.manifest import ProgressCallback
from mtp_dist.config.schema import DataConfig, SourceConfig
from mtp_dist.convert.saved_heads import HEADS_CONFIG
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.tokenizer import Tokenizer
from mtp_dist.errors import CheckpointError, ConfigError, DataError
from mtp_dist.inference.loading import read_folder, read_full_weights
from mtp_dist.inference.model import MTPForCausalLM
from mtp_dist.inference.request import text_limit
from mtp_dist.model.reference import ReferenceModel
from mtp_dist.model.targets import MicroBatch

WINDOW_LENGTH = 256
"""Tokens of a window for a foreign model, whose folder does not name the length of its training."""
TOKENS_PER_BATCH = 1024
"""Tokens of a forward pass over all layers: the logits of a large vocabulary take 200 KB per token."""
HASHED_VALUES = 64
"""Values per weight that identify a model: every kind of training or merging changes some of them."""


@dataclass(frozen=True)
class CausalModel:
    """A model that predicts the next token, fp32, on the GPU if there is one."""

    folder: Path
    network: PreTrainedModel
    tokenizer: Tokenizer
    sequence_length: int
    """Tokens of a window of the text."""
    start: tuple[int, ...] = ()
    """Tokens in front of each window: the one that the tokenizer puts at the beginning of a text, if any."""
    data: DataConfig | None = None
    """Section `data` of a model that was trained here."""
    with_heads: ReferenceModel | None = None
    """The same model with its further heads, if it has any that do not read the tokens in between."""

    @classmethod
    def open(
        cls,
        folder: Path,
        sequence_length: int | None = None,
        on_verified: ProgressCallback = lambda done, total: None,
    ) -> CausalModel:
        """Open a folder of transformers, or a checkpoint, an export or a run with the errors of `read_folder`.

        sequence_length: tokens of a window; by default those of the training, or WINDOW_LENGTH. Raise CheckpointError
        if the folder has no causal language model, ConfigError if the model is not made for windows of that length.
        """
        model = cls._open_foreign(folder) if is_foreign(folder) else cls._open_own(folder, on_verified)
        if sequence_length is None:
            sequence_length = model.sequence_length if model.data else min(model.sequence_length, WINDOW_LENGTH)
        if sequence_length > model.sequence_length:
            raise ConfigError(
                f"--sequence-length = {sequence_length} exceeds the {model.sequence_length} tokens that '{folder}' is "
                "made for: give at most that"
            )
        return replace(model, sequence_length=sequence_length)

    @classmethod
    def _open_own(cls, folder: Path, on_verified: ProgressCallback) -> CausalModel:
        read = read_folder(folder, on_verified)
        network, config, with_heads = _prepare(MTPForCausalLM.from_folder(read, torch.float32)), read.config, None
        if config.heads.count > 1 and not config.heads.reads_drafts:
            weights = {name: weight.float() for name, weight in read_full_weights(folder).weights}
            with_heads = ReferenceModel(config, weights).requires_grad_(False).to(network.device)
        length = text_limit(config)
        return cls(folder, network, read.tokenizer, length, data=config.data, with_heads=with_heads)

    @classmethod
    def _open_foreign(cls, folder: Path) -> CausalModel:
        """Return the model with the longest windows that it is made for."""
        tokenizer = build_tokenizer(str(folder), "--model")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **local
            )
            first = AutoTokenizer.from_pretrained(folder, **local)
        except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"--model = '{folder}' is not a causal language model that transformers can open: {reason}"
            ) from None
        network, report = opened
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"--model = '{folder}' lacks the weight {missing[0]}: save the model again, or give another folder"
            )
        if tokenizer.vocab_size > (embedded := network.get_input_embeddings().num_embeddings):
            raise CheckpointError(
                f"--model = '{folder}' has embeddings for {embedded} tokens, its tokenizer {tokenizer.vocab_size}: put "
                "back the tokenizer that the model was trained with"
            )
        begins = first.bos_token_id is not None and first("").input_ids[:1] == [first.bos_token_id]
        start = (first.bos_token_id,) if begins else ()
        positions = getattr(network.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        return cls(folder, _prepare(network), tokenizer, positions - len(start), start)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def distances(self) -> Sequence[int]:
        """Distances at which it predicts."""
        return (1,)

    @property
    def lookahead(self) -> int:
        """Number of tokens after a window that are read as labels."""
        return 1

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def num_layers(self) -> int:
        layers: int = self.network.config.get_text_config().num_hidden_layers
        return layers

    @property
    def output_layer(self) -> str:
        """Name of the states that the unembedding reads."""
        return FINAL_NORM

    @property
    def window_length(self) -> int:
        """Tokens of a window with the one in front of it."""
        return len(self.start) + self.sequence_length

    @property
    def sources(self) -> Sequence[SourceConfig]:
        """Training sources of a model that was trained here."""
        return self.data.train if self.data else ()

    @property
    def end_of_attention(self) -> int | None:
        """Token after which the model does not attend to what is before; None if it attends across documents."""
        return self.tokenizer.end_of_document if self.data and not self.data.attention_across_documents else None

    def cut(self, tokens: NDArray[np.integer], count: int) -> Tensor:
        """Return consecutive windows of the text with the token after each, `[W, S + 1]`: at most `count`.

        Raise DataError if there is none.
        """
        length = self.sequence_length
        count = min((len(tokens) - 1) // length, count)
        if count < 1:
            raise DataError(f"--data has {len(tokens)} tokens, one window needs {length + 1}: give a longer text")
        text = torch.as_tensor(tokens[: count * length + 1].astype(np.int64), device=self.device)
        return text.unfold(0, length + 1, length)

    def windows(self, tokens: NDArray[np.integer], limit: int) -> list[MicroBatch]:
        """Return batches of consecutive windows with their next tokens, in all about `limit` positions.

        Raise DataError if the text is shorter than one window.
        """
        samples = self.cut(tokens, max(1, limit // self.sequence_length))
        parts = samples.split(max(1, TOKENS_PER_BATCH // self.sequence_length))
        return [MicroBatch(part, part[None, :, 1:], None) for part in parts]

    @torch.no_grad()
    def layer_states(self, batch: MicroBatch) -> LayerStates:
        """Return the states of the embedding, of every layer except the last, and of the last after the final norm.

        Raise CheckpointError if the model does not return them, or returns states of different widths.
        """
        tokens = batch.samples[:, :-1]
        begin = tokens.new_tensor(self.start).expand(len(tokens), -1)
        output = self.network(torch.cat([begin, tokens], 1), output_hidden_states=True, use_cache=False)
        states = [state[:, len(self.start) :] for state in output.hidden_states or ()]
        if len(states) < 2 or len({state.shape for state in states}) > 1:
            raise CheckpointError(
                f"--model = '{self.folder}' does not return the hidden states of its layers, all of one width: its "
                "layers cannot be probed, give a model of another architecture"
            )
        named = {layer_name(index): state for index, state in enumerate(states[:-1])}
        return LayerStates(named | {FINAL_NORM: states[-1]}, iter([output.logits[:, len(self.start) :]]))

    def fingerprint(self) -> str:
        """Return a hash of the first values of each weight."""
        digest = hashlib.sha256()
        for name, weight in self.network.named_parameters():
            digest.update(name.encode())
            digest.update(weight.detach().flatten()[:HASHED_VALUES].cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def is_foreign(folder: Path) -> bool:
    """Return whether the folder has a config.json of transformers, and no further heads."""
    file = folder / "config.json"
    return not (folder / HEADS_CONFIG).exists() and file.exists() and b'"model_type"' in file.read_bytes()


def _prepare(network: PreTrainedModel) -> PreTrainedModel:
    return network.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
