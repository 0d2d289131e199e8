"""The prediction heads on the trunk's output (Gloeckle et al. 2024, section 2)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mtp_dist.config import Config, HeadsConfig
from mtp_dist.config.heads import KindName, condition_rank
from mtp_dist.model.layers import NORMS, AttentionInputs, DecoderLayer, call_recomputed
from mtp_dist.model.linear import ReplicatedLinear
from mtp_dist.model.parameters import head_key
from mtp_dist.model.trunk import embed_tokens


class TransformerHead(nn.ModuleList):
    """`layers_per_head` transformer layers: hidden `[S, B, D]` -> same (Gloeckle et al. 2024, section 2)."""

    def __init__(self, config: Config, megatron: TransformerConfig) -> None:
        first = config.model.trunk_layers + 1
        super().__init__(DecoderLayer(config, megatron, first + depth) for depth in range(config.heads.layers_per_head))

    def forward(self, hidden: Tensor, attention: AttentionInputs) -> Tensor:
        for layer in self:
            hidden = layer(hidden, attention)
        return hidden


class LinearHead(nn.Module):
    """One matrix: W x (the linear heads of Gloeckle et al. 2024, table S4)."""

    def __init__(self, config: Config, megatron: TransformerConfig) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(megatron, config.model.hidden_size, config.model.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.linear(hidden))


class MLPHead(LinearHead):
    """x + SiLU(W x) on normalized hidden states (Medusa, arXiv:2401.10774, section 2.1.1)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(super().forward(hidden))


class SequentialHead(nn.Module):
    """TRM(M [RMSNorm(Emb(x)); RMSNorm(h)]) (DeepSeek-V3, arXiv:2412.19437, equations 21 and 22).

    The paper writes h first; the columns of `eh_proj` are in the order of its released weights and of Megatron-core.
    """

    def __init__(self, config: Config, megatron: TransformerConfig) -> None:
        super().__init__()
        width, norm = config.model.hidden_size, NORMS[megatron.normalization]
        self.hnorm = norm(megatron, width, config.model.norm_eps)
        self.enorm = norm(megatron, width, config.model.norm_eps)
        self.eh_proj = ReplicatedLinear(megatron, 2 * width, width)
        self.layers = TransformerHead(config, megatron)
        self.activation_checkpointing = config.train.activation_checkpointing

    def forward(self, hidden: Tensor, embedded: Tensor, attention: AttentionInputs) -> Tensor:
        """Map the hidden states of the head before and embedded tokens, both `[S, B, D]`, to `[S, B, D]`."""
        projected = call_recomputed(self.activation_checkpointing == "full", self._project, hidden, embedded)
        return cast(Tensor, self.layers(projected, attention))

    def _project(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        projected: Tensor = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        return projected


_HEADS: dict[KindName, Callable[[Config, TransformerConfig], nn.Module]] = {
    "parallel": TransformerHead,
    "causal": TransformerHead,
    "anticausal": TransformerHead,
    "linear": LinearHead,
    "mlp": MLPHead,
    "sequential": SequentialHead,
}


class PreviousTokenCondition(nn.ModuleDict):
    """A_k E x for heads k >= 2: E embeds the token x before a head's target in `[r]`, A_k is a matrix `[D, r]`.

    The low-rank term of DSpark's Markov head, whose bias W_2 W_1 x of the logits has W_2 = U A_k here: the unembedding
    U, which is multiplied anyway, shards it over the vocabulary.
    """

    def __init__(self, config: Config, megatron: TransformerConfig, rank: int) -> None:
        super().__init__()
        self.sequence_parallel = config.parallel.sequence
        self["embedding"] = VocabParallelEmbedding(
            config.padded_vocab_size, rank, init_method=nn.init.zeros_, config=megatron
        )
        for head in range(2, config.heads.count + 1):
            self[str(head)] = ReplicatedLinear(megatron, rank, config.model.hidden_size)

    def forward(self, head: int, tokens: Tensor) -> Tensor:
        """Map tokens `[B, S]` to `[S, B, D]` (`[S/TP, B, D]` under sequence parallelism)."""
        embedding = self["embedding"]
        assert isinstance(embedding, VocabParallelEmbedding)
        return cast(Tensor, self[str(head)](embed_tokens(embedding.weight, tokens, self.sequence_parallel)))


class Unembedding(ColumnParallelLinear):  # type: ignore[misc]
    """Hidden `[S, B, D]` -> this rank's logits `[S, B, V/TP]`, -inf at padded tokens, so that nothing predicts them.

    Under sequence parallelism it gathers its input `[S/TP, B, D]` over the tensor-parallel ranks.
    """

    def __init__(self, config: Config, megatron: TransformerConfig, tied: bool = False) -> None:
        super().__init__(
            config.model.hidden_size,
            config.padded_vocab_size,
            config=megatron,
            init_method=nn.init.zeros_,
            bias=False,
            skip_weight_param_allocation=tied,
        )
        first_token = self.tp_group.rank() * self.output_size_per_partition
        token_ids = torch.arange(first_token, first_token + self.output_size_per_partition)
        self.has_padding = bool(token_ids[-1] >= config.vocab_size)
        self.register_buffer("is_padding", token_ids >= config.vocab_size, persistent=False)

    def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:
        logits, _ = super().forward(hidden, weight)
        return logits.masked_fill(self.is_padding, float("-inf")) if self.has_padding else logits


def chains(heads: HeadsConfig) -> tuple[tuple[int, ...], ...]:
    """Return the heads in the order in which they run.

    The first head of a chain reads the trunk's output z, each other head the hidden states of the head before it.
    """
    numbers = tuple(range(1, heads.count + 1))
    return {
        "trunk": tuple((k,) for k in numbers),
        "previous head": (numbers,),
        "next head": (numbers[::-1],),
    }[heads.traits.reads]


def detached_heads(heads: HeadsConfig) -> frozenset[int]:
    """Return the heads that pass no gradient on to their input."""
    if not heads.detach or heads.weighted_hidden_states:  # the sum that heads 2..n read is separated from the trunk
        return frozenset()
    return frozenset([2]) if heads.traits.reads == "previous head" else frozenset(range(2, heads.count + 1))


def isolated_heads(heads: HeadsConfig) -> frozenset[int]:
    """Return the heads whose losses train only weights that are not head 1's."""
    return frozenset(range(2, heads.count + 1)) if heads.detach == "full" else frozenset()


class HeadContext(NamedTuple):
    """Inputs that the heads read from a micro-batch besides the trunk's output."""

    samples: Tensor
    """`[B, S + lookahead]`."""
    attention: AttentionInputs
    embedding_weight: Tensor | None
    """This rank's rows `[V/TP, D]`; None unless the weight is tied or the heads embed tokens."""


class PredictionHeads(nn.Module):
    """n heads of one kind, then ONE final norm and the unembedding, shared or each head's own.

    They meet `mtp_dist.loss.objective.Heads`, so that their loss can run them one by one. Some of the heads have norm
    and unembedding of their own, which are tied to those of the others.
    """

    global_prefix = ""

    def __init__(self, config: Config, megatron: TransformerConfig, numbers: Sequence[int] = ()) -> None:
        """numbers: those of the heads, by default 1..n. Only heads that read the trunk can be some of them."""
        super().__init__()
        self.config = config
        numbers = numbers or range(1, config.heads.count + 1)
        self.chains = tuple(chain for chain in chains(config.heads) if chain[0] in numbers)
        self.detached = detached_heads(config.heads)
        self.isolated = isolated_heads(config.heads)
        self.traits = config.heads.traits
        self.keys = {head: head_key(config.heads, head) for head in numbers}
        own = filter(None, dict.fromkeys(self.keys.values()))
        others = config.without_adapters()  # low-rank adapters are for trunk and head 1
        self.heads = nn.ModuleDict(
            {key: _HEADS[config.heads.kind](config if key == "1" else others, megatron) for key in own}
        )
        self.final_norm = NORMS[megatron.normalization](megatron, config.model.hidden_size, config.model.norm_eps)
        self.condition: PreviousTokenCondition | None = None
        if rank := condition_rank(config.heads, config.model.hidden_size):
            self.condition = PreviousTokenCondition(config, megatron, rank)
        self.separate = config.heads.unembedding == "separate"
        if self.separate:
            self.unembeddings = nn.ModuleDict({str(k): Unembedding(config, megatron) for k in numbers})
        else:
            self.unembedding = Unembedding(config, megatron, config.model.tie_embeddings)
        if config.heads.token_order:
            self.token_order = Unembedding(config, megatron)

    def pre_norm_hidden(self, head: int, inputs: Tensor, context: HeadContext) -> Tensor:
        """Return the hidden states `[S, B, D]` of a head from z or those of the head before it, see `chains`.

        With weighted hidden states the input is `[2, S, B, D]`: z for head 1, the sum for the others.
        """
        key = self.keys[head]
        if self.config.heads.weighted_hidden_states:
            trunk_output, weighted_sum = inputs
            if self.config.train.freezes_trunk:
                trunk_output = trunk_output.detach()  # only the sum has trained weights
            inputs = trunk_output if head == 1 else weighted_sum
        if key is None or self.traits.block_follows_norm:
            return inputs
        arguments: list[Tensor | AttentionInputs] = [inputs]
        if self.traits.embeds_tokens:
            arguments.append(self._embed_ahead(head - 1, context))
        if self.traits.has_layers:
            arguments.append(context.attention)
        hidden: Tensor = self.heads[key](*arguments)
        return hidden

    def _embed_ahead(self, distance: int, context: HeadContext) -> Tensor:
        """Return the embeddings `[S, B, D]` of the tokens `distance` positions ahead."""
        assert context.embedding_weight is not None, "heads that embed tokens have the embedding on their stage"
        weight = context.embedding_weight.detach() if self.isolated else context.embedding_weight
        return embed_tokens(weight, self._tokens_ahead(distance, context), self.config.parallel.sequence)

    def _tokens_ahead(self, distance: int, context: HeadContext) -> Tensor:
        """Return the tokens `[B, S]` that are `distance` positions ahead."""
        return context.samples[:, distance : distance + self.config.train.sequence_length]

    def normalize(self, head: int, hidden: Tensor, context: HeadContext) -> Tensor:
        """Return what the unembedding reads, `[S, B, D]`, from a head's hidden states."""
        normalized: Tensor = self.final_norm(hidden, frozen=head in self.isolated)
        key = self.keys[head]
        if self.traits.block_follows_norm and key:
            normalized = self.heads[key](normalized)
        if self.condition is None or head == 1:
            return normalized
        before_target = self._tokens_ahead(self.config.heads.distances[head - 1] - 1, context)
        return normalized + cast(Tensor, self.condition(head, before_target))

    def logits(self, head: int, normalized: Tensor, context: HeadContext) -> Tensor:
        """Return this rank's logits `[S, B, V/TP]` of the whole sequence, -inf at padded tokens."""
        return cast(Tensor, self._unembedding(head)(normalized, self._unembedding_weight(head, context)))

    def trained_parameters(self, context: HeadContext) -> list[Tensor]:
        """Return the parameters of `pre_norm_hidden` and `normalize` that training changes."""
        params: list[Tensor] = [*self.heads.parameters(), *self.final_norm.parameters()]
        params += self.condition.parameters() if self.condition is not None else ()
        if self.traits.embeds_tokens and not self.isolated and context.embedding_weight is not None:
            params.append(context.embedding_weight)
        return [param for param in params if param.requires_grad]

    def unembedding_weights(self, context: HeadContext) -> dict[int, Tensor]:
        """Return this rank's rows `[V/TP, D]` by head, see `mtp_dist.loss.objective.Heads`."""
        return {head: self._unembedding_weight(head, context) for head in self.keys}

    @property
    def token_order_weight(self) -> Tensor | None:
        """This rank's rows `[V/TP, D]` of the token-order unembedding."""
        weight: Tensor | None = self.token_order.weight if self.config.heads.token_order else None
        return weight

    def _unembedding_weight(self, head: int, context: HeadContext) -> Tensor:
        tied = self.config.model.tie_embeddings
        weight: Tensor | None = context.embedding_weight if tied else self._unembedding(head).weight
        assert weight is not None, "heads with tied embeddings have the embedding on their stage"
        return weight.detach() if head in self.isolated and not self.separate else weight

    def _unembedding(self, head: int) -> Unembedding:
        module = self.unembeddings[str(head)] if self.separate else self.unembedding
        assert isinstance(module, Unembedding)
        return module
