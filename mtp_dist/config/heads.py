"""The section of the prediction heads: their architecture, their targets and the weights of their losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat

from mtp_dist.config.base import NonNegativeInt, PositiveInt, Section, StepValues

KindName = Literal["parallel", "causal", "anticausal", "linear", "mlp", "sequential"]


class HeadKind(NamedTuple):
    """Properties of a kind of heads. None has a default: a new kind must decide each of them."""

    reads: Literal["trunk", "previous head", "next head"]
    """Input of head k: the trunk's output z; the hidden states of head k - 1, or z if k = 1; those of head k + 1, or
    z if k = n."""
    embeds_tokens: bool
    """True if a block also reads the embeddings of the tokens before its target."""
    first_head_has_block: bool
    """True if head 1 has a block, not only those from head 2 on."""
    block_follows_norm: bool
    """True if the block is between the final norm and the unembedding, not between the head's input and the norm."""
    has_layers: bool
    """True if a block has `heads.layers_per_head` transformer layers."""
    weights: Mapping[str, tuple[int, ...]]
    """Shapes in units of D of a block's other weights, by name and in the order of the forward pass."""
    repeatable: bool
    """True if one block can serve all heads from head 2 on (`heads.repeated`)."""
    exportable: bool
    """True if a Llama can compute trunk and head 1."""


_PARALLEL = HeadKind(
    reads="trunk",
    embeds_tokens=False,
    first_head_has_block=True,
    block_follows_norm=False,
    has_layers=True,
    weights={},
    repeatable=False,
    exportable=True,
)
KINDS: dict[KindName, HeadKind] = {
    "parallel": _PARALLEL,
    "causal": _PARALLEL._replace(reads="previous head"),
    "anticausal": _PARALLEL._replace(reads="next head"),
    "linear": HeadKind(
        reads="trunk",
        embeds_tokens=False,
        first_head_has_block=True,
        block_follows_norm=False,
        has_layers=False,
        weights={"linear.weight": (1, 1)},
        repeatable=False,
        exportable=False,
    ),
    "mlp": HeadKind(
        reads="trunk",
        embeds_tokens=False,
        first_head_has_block=False,
        block_follows_norm=True,
        has_layers=False,
        weights={"linear.weight": (1, 1)},
        repeatable=False,
        exportable=True,
    ),
    "sequential": HeadKind(
        reads="previous head",
        embeds_tokens=True,
        first_head_has_block=False,
        block_follows_norm=False,
        has_layers=True,
        weights={"hnorm.weight": (1,), "enorm.weight": (1,), "eh_proj.weight": (1, 2)},
        repeatable=True,
        exportable=True,
    ),
}


CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Memory for the logits of one chunk, in bytes, by type of device.

Each chunk reads the weight and its gradient once more. That costs little if it is small compared with the chunk's
matmuls, which takes more positions the more FLOPs a device does per byte it reads: hundreds on a CPU, thousands on a
GPU.
"""


class HeadsConfig(Section):
    """The prediction heads."""

    count: Annotated[PositiveInt, Field(le=1000)] = 4
    """Prediction heads n: head k = 1..n predicts the token k positions ahead."""
    kind: KindName = "parallel"
    """`parallel`: each head has `layers_per_head` transformer layers on the trunk's output; `causal`: head k reads head
    k - 1 instead, `anticausal`: head k + 1; `linear`: each head is a matrix; `mlp`: each head from head 2 on is a
    residual block (Medusa); `sequential`: each head from head 2 on is a transformer block that reads the previous head
    and the token before its target (DeepSeek-V3)."""
    layers_per_head: Annotated[NonNegativeInt, Field(le=1000)] = 1
    """Transformer layers of each head, or of each `sequential` block. 0, for `parallel` heads with `separate`
    unembeddings, replicates the unembedding alone: all heads read the trunk's output."""
    repeated: bool = False
    """Share one block among all heads from head 2 on (`sequential` only)."""
    prediction_distances: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] | None = None
    """Positions ahead that heads 1..n predict, increasing from 1, such as [1, 3, 5, 7]; 1..n by default."""
    unembedding: Literal["shared", "separate"] = "shared"
    """`shared`: all heads share one unembedding; `separate`: each head has its own. All heads share one final norm."""
    condition: Literal["none", "previous_token"] = "none"
    """`previous_token`: from head 2 on, add to what the unembedding reads a linear function of low rank of the token
    before the head's target, which is the true one in training and the drafted one in decoding (DSpark). For kinds
    `parallel`, `linear` and `mlp`."""
    condition_rank: PositiveInt | None = None
    """Rank of that function; by default an eighth of `model.hidden_size`, at most 256."""
    weighted_hidden_states: bool = False
    """Let heads 2..n read, instead of the trunk's output, a learned softmax-weighted sum of the outputs of the
    embedding and of every trunk layer (`parallel`, `linear` and `mlp`). Its weight of the last layer is 0.99 at first.
    Head 1 reads the trunk's output."""
    detach: bool | Literal["full"] = False
    """`true`: stop the gradient of heads 2..n before the trunk's layers and those of head 1. Their losses still train
    what all heads share: the final norm, the unembedding, and the embedding if heads read it. `full`: they do not train
    these either, only the heads' own weights."""
    loss_weights: Annotated[tuple[NonNegativeFloat, ...], Field(strict=False)] | None = None
    """Weight w_k of each head's loss, head 1 first; by default all 1."""
    auxiliary_weight: NonNegativeFloat | StepValues | None = None
    """Instead of `loss_weights`: 1 for head 1, and this number divided equally among the others (DeepSeek-V3's
    lambda/D). A list such as [[1, 0.3], [10000, 0.1]] changes it at these steps."""
    loss_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of `loss_weights`: beta^(k-1) divided by the sum over all heads, where k is the head's number."""
    schedule: Literal["constant", "forward", "reverse"] = "constant"
    """Heads that run and learn in n equal stages of `train.steps`: all; heads 1..s in stage s (`forward`); heads
    1..n-s+1 (`reverse`). The gradient of the others is 0."""
    distillation: NonNegativeFloat = 0.0
    """Weight of an additional loss of each head from head 2 on: the cross-entropy to head 1's distribution for the same
    token (MTP-D). It does not train head 1."""
    distillation_top: PositiveInt = 64
    """Number of most probable tokens that head 1's distribution is truncated to."""
    total_variation: NonNegativeFloat = 0.0
    """Weight of an additional loss of each head from head 2 on: the total variation distance to head 1's distribution,
    which is 1 minus the fraction of the head's drafts that rejection sampling accepts. It does not train head 1."""
    token_order: NonNegativeFloat = 0.0
    """Weight of token-order prediction: an additional unembedding on head 1's hidden states ranks the upcoming
    tokens."""
    token_order_window: PositiveInt = 32
    """Number of positions ahead that it ranks; the weight of each rank is 1/e of the one before."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of the softmax's denominator, added to each cross-entropy (PaLM uses 1e-4 to keep
    logits from drifting). The reported losses exclude it."""
    loss_mode: Literal["eager", "recompute", "naive"] = "eager"
    """`eager` runs each head forward and backward before the next one, so that memory is that of one head (chained
    kinds also keep the activations of their blocks, not their logits); `recompute` does so in the backward pass, at the
    cost of one more forward pass of the heads, and keeps nothing until then; `naive`, a reference, keeps the logits of
    all heads until the backward pass."""
    stages: PositiveInt = 1
    """Number of last pipeline stages that have some of the heads each, head 1 on the first of them, on which the trunk
    ends (`parallel`, `linear` and `mlp`). How many each has is chosen as `parallel.partition` is by `balanced`."""
    chunk_tokens: PositiveInt | None = None
    """Number of tokens whose logits are in memory at once in `eager` and `recompute`; by default as many as fit into
    64 MiB on a CPU and 1 GiB on a GPU."""

    @property
    def traits(self) -> HeadKind:
        """Properties of the heads' kind."""
        return KINDS[self.kind]

    @property
    def distances(self) -> tuple[int, ...]:
        """Positions ahead that heads 1..n predict."""
        return self.prediction_distances or tuple(range(1, self.count + 1))

    @property
    def lookahead(self) -> int:
        """Number of tokens after a sample's last position that are read as labels."""
        return max(self.distances[-1], self.token_order_window if self.token_order else 0)

    @property
    def num_blocks(self) -> int:
        """Number of heads that have a block between the trunk and the final norm."""
        return self.active_blocks(self.count)

    def active_blocks(self, active: int) -> int:
        """Return the number of blocks of heads 1..active."""
        return active if self.traits.first_head_has_block else active - 1

    @property
    def block_layers(self) -> int:
        """Number of transformer layers in one block."""
        return self.layers_per_head if self.traits.has_layers else 0

    @property
    def adapted_layers(self) -> int:
        """Number of head 1's own transformer layers, which `train.low_rank` adapts like those of the trunk."""
        return self.block_layers if self.traits.first_head_has_block else 0

    @property
    def reads_drafts(self) -> bool:
        """True if a head from head 2 on reads the token before its target, in decoding the draft of another head."""
        return self.count > 1 and (self.traits.embeds_tokens or self.condition != "none")


def condition_rank(heads: HeadsConfig, hidden_size: int) -> int:
    """Return the rank of `heads.condition`; 0 without one."""
    if heads.condition == "none" or heads.count == 1:
        return 0
    return heads.condition_rank or max(1, min(256, hidden_size // 8))


def weight_differences(saved: HeadsConfig, wanted: HeadsConfig, hidden_size: int) -> Iterator[tuple[str, Any, Any]]:
    """Yield the keys that keep heads from having the weights of saved ones, with the saved and the wanted value.

    Heads without a condition can get one, which starts at 0, and heads on the trunk's output weighted hidden states.
    """
    weights = ("kind", "layers_per_head", "repeated", "unembedding")
    keys = {key: (getattr(saved, key), getattr(wanted, key)) for key in weights}
    if saved.condition != "none" and wanted.count > 1:
        keys["condition"] = saved.condition, wanted.condition
        keys["condition_rank"] = condition_rank(saved, hidden_size), condition_rank(wanted, hidden_size)
    if saved.weighted_hidden_states and wanted.count > 1:
        keys["weighted_hidden_states"] = True, wanted.weighted_hidden_states
    yield from ((key, *values) for key, values in keys.items() if values[0] != values[1])


def drafting_head(distances: Sequence[int], distance: int) -> int:
    """Return the number of the head that drafts the token `distance` positions ahead: the nearest that predicts as far.

    distances: positions ahead that heads 1, 2, ... predict. A head that predicts further drafts from an earlier
    position.
    """
    return next(head for head, reach in enumerate(distances, 1) if reach >= distance)
