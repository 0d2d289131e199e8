"""The prediction heads on the trunk's output (Gloeckle et al. 2024, section 2)."""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn

from mtp_dist.config import Config, HeadsConfig
from mtp_dist.model.blocks import LinearHead, ResidualHead, SequentialHead, TransformerHead
from mtp_dist.model.layers import RMSNorm, transformer_config
from mtp_dist.model.parameters import head_key

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

    def __init__(self, config: Config, vocab_size: int, padded_vocab_size: int, tied: bool = False) -> None:
        super().__init__(
            config.model.hidden_size,
            padded_vocab_size,
            config=transformer_config(config),
            init_method=nn.init.zeros_,
            bias=False,
            skip_weight_param_allocation=tied,
        )
        first_entry = self.tp_group.rank() * self.output_size_per_partition
        entries = torch.arange(first_entry, first_entry + self.output_size_per_partition)
        self.has_padding = bool(entries[-1] >= vocab_size)
        self.register_buffer("padding", entries >= vocab_size, persistent=False)

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

    def __init__(self, config: Config, vocab_size: int, padded_vocab_size: int) -> None:
        super().__init__()
        self.kind = config.heads.kind
        numbers = range(1, config.heads.count + 1)
        self.keys = {head: head_key(config.heads, head) for head in numbers}
        own = filter(None, dict.fromkeys(self.keys.values()))
        self.heads = nn.ModuleDict({key: _HEADS[self.kind](config) for key in own})
        self.final_norm = RMSNorm(transformer_config(config), config.model.hidden_size, config.model.norm_eps)
        self.separate = config.heads.unembedding == "separate"
        if self.separate:
            self.unembeddings = nn.ModuleDict(
                {str(k): Unembedding(config, vocab_size, padded_vocab_size) for k in numbers}
            )
        else:
            self.unembedding = Unembedding(config, vocab_size, padded_vocab_size, config.model.tie_embeddings)
        if config.heads.token_order:
            self.token_order = Unembedding(config, vocab_size, padded_vocab_size)

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
