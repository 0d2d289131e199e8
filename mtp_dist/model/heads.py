"""The prediction heads on the trunk's output (Gloeckle et al. 2024, section 2)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from mtp_dist.config import Config, HeadsConfig
from mtp_dist.model.layers import DecoderLayer, RMSNorm, recompute, transformer_config
from mtp_dist.model.parameters import head_key


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


class PredictionHeads(nn.Module):
    """n heads of one kind, then ONE final norm and the unembedding, shared or each head's own.

    Each head has a state: what it makes of the state of the head before it in its chain, or of z. Its hidden states,
    which the unembedding reads, are the normalized state.
    """

    global_prefix = ""

    def __init__(self, config: Config) -> None:
        super().__init__()
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

    def state(self, head: int, before: Tensor, embed: Callable[[int], Tensor], attention_bias: Tensor | None) -> Tensor:
        """State `[S, B, D]` of head 1..n from the one before it. embed(j) embeds the token j positions ahead.

        attention_bias: see CausalAttention.
        """
        key = self.keys[head]
        if key is None or self.kind == "mlp":
            return before
        module = self.heads[key]
        state: Tensor
        if self.kind == "linear":
            state = module(before)
        elif self.kind == "sequential":
            state = module(before, embed(head - 1), attention_bias)
        else:
            state = module(before, attention_bias)
        return state

    def hidden(self, head: int, state: Tensor) -> Tensor:
        """What the unembedding reads, `[S, B, D]`, from the state of head 1..n."""
        hidden: Tensor = self.final_norm(state)
        key = self.keys[head]
        return self.heads[key](hidden) if self.kind == "mlp" and key else hidden

    def unembedding_of(self, head: int) -> Unembedding:
        """What maps the hidden states of head 1..n to this rank's logits."""
        module = self.unembeddings[str(head)] if self.separate else self.unembedding
        assert isinstance(module, Unembedding)
        return module
