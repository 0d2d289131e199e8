"""The prediction heads on the trunk's output (Gloeckle et al. 2024, section 2)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from mtp_dist.config import Config, HeadsConfig
from mtp_dist.model.layers import DecoderLayer, RMSNorm, recompute, transformer_config
from mtp_dist.model.parameters import head_key
from mtp_dist.model.trunk import embed_tokens


class ReplicatedLinear(nn.Module):
    """A matrix `[out, in]` without bias, whole on every tensor-parallel rank: hidden `[..., in]` -> `[..., out]`.

    Under sequence parallelism each rank multiplies its own part of the sequence, and the copy-to-region mapping sums
    the weight's gradient over the ranks (see RMSNorm).
    """

    def __init__(self, config: Config, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.sequence_parallel = config.parallel.sequence

    def forward(self, hidden: Tensor) -> Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.sequence_parallel else self.weight
        return F.linear(hidden, weight)


class TransformerHead(nn.ModuleList):
    """`layers_per_head` transformer layers: hidden `[S, B, D]` -> same (Gloeckle et al. 2024, section 2).

    attention_bias: see CausalAttention.
    """

    def __init__(self, config: Config) -> None:
        first = config.model.trunk_layers + 1
        super().__init__(DecoderLayer(config, first + depth) for depth in range(config.heads.layers_per_head))

    def forward(self, hidden: Tensor, attention_bias: Tensor | None) -> Tensor:
        for layer in self:
            hidden = layer(hidden, attention_bias)
        return hidden


class LinearHead(nn.Module):
    """One matrix: W x (the linear heads of Gloeckle et al. 2024, table S4)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(config, config.model.hidden_size, config.model.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.linear(hidden)
        return output


class ResidualHead(LinearHead):
    """x + SiLU(W x) on normalized hidden states (Medusa, arXiv:2401.10774, section 2.1.1)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(super().forward(hidden))


class SequentialHead(nn.Module):
    """TRM(M [RMSNorm(Emb(x)); RMSNorm(h)]) (DeepSeek-V3, arXiv:2412.19437, equations 21 and 22).

    The paper writes h first; the columns of `eh_proj` are in the order of its released weights and of Megatron-core.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, shared = config.model.hidden_size, transformer_config(config)
        self.hnorm = RMSNorm(shared, width, config.model.norm_eps)
        self.enorm = RMSNorm(shared, width, config.model.norm_eps)
        self.eh_proj = ReplicatedLinear(config, 2 * width, width)
        self.layers = TransformerHead(config)
        self.activation_checkpointing = config.train.activation_checkpointing

    def forward(self, hidden: Tensor, embedded: Tensor, attention_bias: Tensor | None) -> Tensor:
        """hidden of the head before and embedded tokens, both `[S, B, D]` -> `[S, B, D]`."""
        whole = self.activation_checkpointing == "full" and torch.is_grad_enabled()
        joined = recompute(self._join, hidden, embedded) if whole else self._join(hidden, embedded)
        output: Tensor = self.layers(joined, attention_bias)
        return output

    def _join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        joined: Tensor = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        return joined


_HEADS: dict[str, Callable[[Config], nn.Module]] = {
    "parallel": TransformerHead,
    "causal": TransformerHead,
    "anticausal": TransformerHead,
    "linear": LinearHead,
    "mlp": ResidualHead,
    "sequential": SequentialHead,
}


class Unembedding(ColumnParallelLinear):  # type: ignore[misc]
    """Hidden `[S, B, D]` -> this rank's logits `[S, B, V/TP]`; padded entries are -inf, so nothing can predict them.

    Under sequence parallelism it gathers its input `[S/TP, B, D]` over the tensor-parallel ranks.
    """

    def __init__(self, config: Config, tied: bool = False) -> None:
        super().__init__(
            config.model.hidden_size,
            config.padded_vocab_size,
            config=transformer_config(config),
            init_method=nn.init.zeros_,
            bias=False,
            skip_weight_param_allocation=tied,
        )
        first_entry = self.tp_group.rank() * self.output_size_per_partition
        entries = torch.arange(first_entry, first_entry + self.output_size_per_partition)
        self.has_padding = bool(entries[-1] >= config.vocab_size)
        self.register_buffer("padding", entries >= config.vocab_size, persistent=False)

    def forward(self, hidden: Tensor, tied_weight: Tensor | None) -> Tensor:
        logits, _ = super().forward(hidden, tied_weight)
        return logits.masked_fill(self.padding, float("-inf")) if self.has_padding else logits


def chains(heads: HeadsConfig) -> tuple[tuple[int, ...], ...]:
    """The heads in the order in which they must run. The first of a chain reads z, the next ones the one before."""
    numbers = tuple(range(1, heads.count + 1))
    if heads.kind == "anticausal":
        return (numbers[::-1],)
    return (numbers,) if heads.kind in ("causal", "sequential") else tuple((k,) for k in numbers)


def detached_heads(heads: HeadsConfig) -> frozenset[int]:
    """Heads that hand no gradient to what they read."""
    if not heads.detach:
        return frozenset()
    return frozenset([2]) if heads.kind in ("causal", "sequential") else frozenset(range(2, heads.count + 1))


class HeadContext(NamedTuple):
    """What the heads read of a micro-batch besides the trunk's output."""

    samples: Tensor
    """`[B, S + lookahead]`."""
    attention_bias: Tensor | None
    """See CausalAttention."""
    embedding_weight: Tensor | None
    """This rank's rows `[V/TP, D]`; None unless it is tied or the heads embed tokens."""


class PredictionHeads(nn.Module):
    """n heads of one kind, then ONE final norm and the unembedding, shared or each head's own.

    Each head has a state: what it makes of the state of the head before it in its chain, or of z. Its hidden states,
    which the unembedding reads, are the normalized state.
    """

    global_prefix = ""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.chains = chains(config.heads)
        self.detached = detached_heads(config.heads)
        self.kind = config.heads.kind
        numbers = range(1, config.heads.count + 1)
        self.keys = {head: head_key(config.heads, head) for head in numbers}
        own = filter(None, dict.fromkeys(self.keys.values()))
        self.heads = nn.ModuleDict({key: _HEADS[self.kind](config) for key in own})
        self.final_norm = RMSNorm(transformer_config(config), config.model.hidden_size, config.model.norm_eps)
        self.separate = config.heads.unembedding == "separate"
        if self.separate:
            self.unembeddings = nn.ModuleDict({str(k): Unembedding(config) for k in numbers})
        else:
            self.unembedding = Unembedding(config, config.model.tie_embeddings)
        if config.heads.token_order:
            self.token_order = Unembedding(config)

    def pre_norm_hidden(self, head: int, inputs: Tensor, context: HeadContext) -> Tensor:
        """Return the hidden states `[S, B, D]` of a head from z or those of the head before it, see `chains`."""
        key = self.keys[head]
        if key is None or self.kind == "mlp":
            return inputs
        module = self.heads[key]
        hidden: Tensor
        if self.kind == "linear":
            hidden = module(inputs)
        elif self.kind == "sequential":
            hidden = module(inputs, self._embed_ahead(head - 1, context), context.attention_bias)
        else:
            hidden = module(inputs, context.attention_bias)
        return hidden

    def _embed_ahead(self, distance: int, context: HeadContext) -> Tensor:
        """Return the embeddings `[S, B, D]` of the tokens `distance` positions ahead."""
        assert context.embedding_weight is not None, "sequential heads have the embedding on the last stage"
        tokens = context.samples[:, distance : distance + self.config.train.sequence_length]
        return embed_tokens(context.embedding_weight, tokens, self.config.parallel.sequence)

    def normalize(self, head: int, hidden: Tensor) -> Tensor:
        """Return what the unembedding reads, `[S, B, D]`, from a head's hidden states."""
        normalized: Tensor = self.final_norm(hidden)
        key = self.keys[head]
        return self.heads[key](normalized) if self.kind == "mlp" and key else normalized

    def logits(self, head: int, normalized: Tensor, context: HeadContext) -> Tensor:
        """Return this rank's logits `[S, B, V/TP]` of the whole sequence, -inf at padded tokens."""
        logits: Tensor = self._unembedding(head)(normalized, self._tied_weight(context))
        return logits

    def trained_parameters(self, context: HeadContext) -> list[Tensor]:
        """Return the parameters of `pre_norm_hidden` and `normalize` that training changes."""
        params: list[Tensor] = [*self.heads.parameters(), *self.final_norm.parameters()]
        if self.kind == "sequential" and context.embedding_weight is not None:
            params.append(context.embedding_weight)
        return [param for param in params if param.requires_grad]

    def unembedding_weights(self, context: HeadContext) -> list[Tensor]:
        """Return this rank's rows `[V/TP, D]` for heads 1..n: n times the same tensor if the heads share it."""
        tied = self._tied_weight(context)
        return [self._unembedding(head).weight if tied is None else tied for head in self.keys]

    @property
    def token_order_weight(self) -> Tensor | None:
        """This rank's rows `[V/TP, D]` of the token-order unembedding."""
        weight: Tensor | None = self.token_order.weight if self.config.heads.token_order else None
        return weight

    def _tied_weight(self, context: HeadContext) -> Tensor | None:
        return context.embedding_weight if self.config.model.tie_embeddings else None

    def _unembedding(self, head: int) -> Unembedding:
        module = self.unembeddings[str(head)] if self.separate else self.unembedding
        assert isinstance(module, Unembedding)
        return module
