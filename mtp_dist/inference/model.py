"""Trunk and heads for generation: a model of transformers, and the blocks of heads 2..n."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from mtp_dist.config.heads import condition_rank
from mtp_dist.errors import CheckpointError
from mtp_dist.inference.adaptive import AdaptiveLength, MeasuredAcceptance
from mtp_dist.inference.backbone import BACKBONES, new_norm
from mtp_dist.inference.cache import PositionCache
from mtp_dist.inference.configuration import MTPConfig, generation_model_config
from mtp_dist.inference.decoding import decode
from mtp_dist.inference.drafting import DraftState
from mtp_dist.inference.loading import ModelFolder, read_folder
from mtp_dist.inference.spans import Span
from mtp_dist.inference.speculation import Speculation
from mtp_dist.model.parameters import head_key

ONLY_TRANSFORMERS = (
    "custom_generate",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "prefix_allowed_tokens_fn",
    "guidance_scale",
    "watermarking_config",
    "return_dict_in_generate",
    "inputs_embeds",
    "cache",
    "past_key_values",
)
"""Arguments of `generate` that only transformers' own decoding serves."""


class LinearFirstHead(nn.Module):
    """The matrix and the final norm of head 1 of kind `linear`, in the place of the final norm."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = new_norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.linear(hidden))


class DraftBlock(nn.Module):
    """The weights of one head from head 2 on: transformer layers and the matrices and norms of its kind."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        width, kind = config.hidden_size, config.heads.traits
        # Their places in the cache are set before each call: a repeated block has one for each head.
        _, layer = BACKBONES[config.backbone]
        self.layers = nn.ModuleList(layer(config, 0) for _ in range(config.heads.block_layers))
        for name, shape in kind.weights.items():
            module = new_norm(config) if len(shape) == 1 else nn.Linear(shape[1] * width, shape[0] * width, bias=False)
            self.add_module(name.removesuffix(".weight"), module)


class MTPForCausalLM(LlamaForCausalLM):
    """A trained model of any kind of heads: called and generated from like a Llama, it predicts with head 1.

    The layers of `model`, of the class that the architecture has, are those of the trunk, then those of head 1.
    """

    config_class = MTPConfig
    _no_split_modules = [layer.__name__ for _, layer in BACKBONES.values()]  # noqa: RUF012, as transformers has it

    def __init__(self, config: MTPConfig) -> None:
        super().__init__(config)
        if config.backbone != "llama":
            self.model = BACKBONES[config.backbone][0](config)
        self.heads = heads = config.heads
        kind = heads.traits
        keys = {k: str(head_key(heads, k)) for k in range(2, heads.count + 1)}
        if heads.kind == "linear":
            self.model.norm = LinearFirstHead(config)
        in_llama = kind.reads == "next head"  # head 1 reaches the trunk through the others
        blocks = {} if in_llama else {key: DraftBlock(config) for key in dict.fromkeys(keys.values())}
        self.draft_blocks = nn.ModuleDict(blocks)
        separate = heads.count > 1 and heads.unembedding == "separate"
        self.draft_unembeddings = nn.ModuleDict(
            {str(k): nn.Linear(config.hidden_size, config.vocab_size, bias=False) for k in keys} if separate else {}
        )
        self.draft_condition = nn.ModuleDict()
        if rank := condition_rank(heads, config.hidden_size):
            self.draft_condition["embedding"] = nn.Embedding(config.vocab_size, rank)
            self.draft_condition.update({str(k): nn.Linear(rank, config.hidden_size, bias=False) for k in keys})
        self._condition_tables: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        """`[r, V]` by head and place of the weights, see `condition_logits`."""
        if heads.weighted_hidden_states:
            self.weighted_hidden_states = nn.ParameterDict({"logits": torch.zeros(config.trunk_layers + 1)})
        self.measured_acceptance = MeasuredAcceptance(heads.distances[-1])
        self.adaptive_lengths: dict[int, AdaptiveLength] = {}
        """The choices of the draft length, by batch size rounded up to a power of two."""
        self.post_init()  # type: ignore[no-untyped-call]

    def generate(self, *args: Any, speculation: Speculation | None = None, **kwargs: Any) -> Any:
        """Generate as transformers does, with the same arguments and result, several tokens per forward pass.

        Beam search, contrastive search, assistants, constraints, guidance, watermarks, results other than the tokens,
        and embeddings or a cache from outside are left to transformers, without drafts.
        """
        config = kwargs.get("generation_config") or self.generation_config
        wanted = (kwargs.get(key, getattr(config, key, None)) for key in ONLY_TRANSFORMERS)
        beams = kwargs.get("num_beams") or config.num_beams or 1
        if beams > 1 or any(value is not None and value is not False for value in wanted):
            return super().generate(*args, **kwargs)
        return super().generate(
            *args, custom_generate=partial(decode, speculation=speculation or Speculation()), **kwargs
        )

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        """Return the arguments of the decoding, with two that transformers omits if it is a function."""
        kept = {"tokenizer": kwargs.get("tokenizer"), "streamer": streamer}
        arguments = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        return arguments | {name: value for name, value in kept.items() if value is not None}

    def adaptive_length(self, batch_size: int) -> AdaptiveLength:
        """Return the choice of the draft length for a batch size, with what earlier calls measured."""
        size = 1 << (batch_size - 1).bit_length()
        if size not in self.adaptive_lengths:
            self.adaptive_lengths[size] = AdaptiveLength(self.heads.distances[-1], self.measured_acceptance)
        return self.adaptive_lengths[size]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **options: Any
    ) -> Any:
        """Open a checkpoint or an export, with the options and errors of `from_folder` and `read_folder`.

        Without a folder return what transformers does for a `config` and a `state_dict`.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **options)
        return cls.from_folder(read_folder(Path(pretrained_model_name_or_path)), **options)

    @classmethod
    def from_folder(cls, folder: ModelFolder, dtype: torch.dtype | None = None, **options: Any) -> MTPForCausalLM:
        """Return the model of a folder. Raise CheckpointError if it lacks a weight.

        dtype: by default the folder's. options: those of transformers' `from_pretrained`, such as `device_map`.
        """
        config, end = folder.config, folder.tokenizer.end_of_document
        dtype = dtype or folder.dtype
        with _silent_loading():
            model, report = cls.from_pretrained(
                None,
                config=generation_model_config(config, end, config.train.precision),
                state_dict={name: weight.to(dtype) for name, weight in folder.weights},
                dtype=dtype,
                output_loading_info=True,
                **options,
            )
        if wrong := sorted(report["missing_keys"] | report["unexpected_keys"]):
            raise CheckpointError(
                f"--model = '{folder.path}' has other weights than its configuration requires: {wrong[0]}"
            )
        model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
        return model.eval()

    @property
    def num_cache_layers(self) -> int:
        """Number of transformer layers with keys and values: the model's, then those of heads 2..n."""
        return self.config.num_hidden_layers + self.num_draft_layers

    @property
    def num_draft_layers(self) -> int:
        heads = self.heads
        return 0 if heads.traits.reads == "next head" else (heads.count - 1) * heads.block_layers

    def run_trunk(self, token_ids: Tensor, span: Span, cache: PositionCache) -> tuple[Tensor, Tensor]:
        """Run trunk and head 1 on the tokens `[B, q]` of the span.

        Return head 1's hidden states before the final norm `[B, q, D]`, and those that the other heads read
        `[B, q, F]`: F is D, or (n - 1) D for anticausal heads, whose own states they are, head 2 first.
        """
        cache.span = span
        hidden = self.model.embed_tokens(token_ids)
        rotary, mask = self.model.rotary_emb(hidden, span.positions), span.mask_within(self.config.sliding_window)
        read_depths, state_weights = self._read_depths(), self._state_weights()
        weighted_sum = state_weights[0] * hidden if state_weights else None
        read: list[Tensor] = []
        for depth, layer in enumerate(self.model.layers, 1):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, cache=cache)
            if weighted_sum is not None and depth < len(state_weights):
                weighted_sum = weighted_sum.to(hidden.device) + state_weights[depth] * hidden
            if depth in read_depths:
                read.insert(0, (hidden if weighted_sum is None else weighted_sum).to(token_ids.device))
        return hidden, torch.cat(read, -1) if len(read) > 1 else read[0]

    def _state_weights(self) -> list[float]:
        """Return the weights of the trunk's hidden states in the sum that heads 2..n read; empty if they read z."""
        if not self.heads.weighted_hidden_states:
            return []
        weights: list[float] = self.weighted_hidden_states["logits"].float().softmax(0).tolist()
        return weights

    def _read_depths(self) -> list[int]:
        """Return the numbers of layers of the model after which the other heads read its hidden states."""
        heads, trunk = self.heads, self.config.trunk_layers
        match heads.traits.reads:
            case "trunk":
                return [trunk]
            case "previous head":
                return [self.config.num_hidden_layers]
            case _:  # head 1 reads the others, whose states are their drafts
                return [trunk + heads.layers_per_head * blocks for blocks in range(1, max(heads.count, 2))]

    def first_head_logits(self, hidden: Tensor) -> Tensor:
        """Return head 1's logits `[..., V]` for its hidden states before the final norm `[..., D]`."""
        return self.lm_head(self.model.norm(hidden))

    def draft_hidden(self, k: int, before: Tensor, embedded: Tensor | None, state: DraftState) -> Tensor:
        """Return the hidden states before the final norm `[B, q, D]` of head k >= 2.

        before: hidden states that it reads. embedded: embeddings of the tokens before its targets, for `sequential`.
        """
        heads, kind = self.heads, self.heads.traits
        if kind.reads == "next head":
            width = self.config.hidden_size
            return before[..., (k - 2) * width : (k - 1) * width]
        if kind.block_follows_norm or (kind.has_layers and not heads.block_layers):
            return before
        block = self._block(k)
        if not kind.has_layers:
            return block.linear(before)
        if embedded is not None:
            before = block.eh_proj(torch.cat([block.enorm(embedded), block.hnorm(before)], -1))
        state.cache.span = state.span
        state.rotary = state.rotary or self.model.rotary_emb(before, state.span.positions)
        mask = state.span.mask_within(self.config.sliding_window)
        first = self.config.num_hidden_layers + (k - 2) * heads.block_layers
        for index, layer in enumerate(block.layers, first):
            layer.self_attn.layer_idx = index
            before = layer(before, attention_mask=mask, position_embeddings=state.rotary, cache=state.cache)
        return before

    def _block(self, k: int) -> Any:
        return self.draft_blocks[str(head_key(self.heads, k))]

    def draft_logits(self, heads: Sequence[int], hidden: Tensor) -> Tensor:
        """Return logits `[B, m, V]` of m heads >= 2 for their hidden states before the final norm `[B, m, D]`.

        Without what `condition_logits` adds to them.
        """
        norm = self.model.norm
        hidden = norm.norm(hidden) if isinstance(norm, LinearFirstHead) else norm(hidden)
        if self.heads.traits.block_follows_norm:
            residuals = [F.silu(self._block(k).linear(hidden[:, column])) for column, k in enumerate(heads)]
            hidden = hidden + torch.stack(residuals, 1)
        if self.draft_unembeddings:
            logits = [self.draft_unembeddings[str(k)](hidden[:, column]) for column, k in enumerate(heads)]
            return torch.stack(logits, 1)
        return self.lm_head(hidden)

    def condition_logits(self, k: int, previous_tokens: Tensor) -> Tensor:
        """Return what `heads.condition` adds to logits `[..., V]` of head k after the tokens `[...]`.

        The product of the unembedding and the head's matrix is computed once, so that a draft reads V * r weights, not
        the unembedding's V * D.
        """
        embedding: Any = self.draft_condition["embedding"]
        key = k, embedding.weight.device, embedding.weight.dtype
        if key not in self._condition_tables:
            identity = torch.eye(embedding.embedding_dim).to(embedding.weight)
            unembedding = self.draft_unembeddings[str(k)] if self.draft_unembeddings else self.lm_head
            self._condition_tables[key] = unembedding(self.draft_condition[str(k)](identity))
        table = self._condition_tables[key]
        return embedding(previous_tokens).to(table.device) @ table


@contextmanager
def _silent_loading() -> Iterator[None]:
    """Silence transformers' progress bar, and its report of missing weights, which is an error here."""
    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
