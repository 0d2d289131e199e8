"""Work of one rank of a pipeline stage: FLOPs of each pass of a micro-batch and bytes that it sends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mtp_dist.config import Config, LowRankConfig
from mtp_dist.config.heads import condition_rank
from mtp_dist.config.schema import ModelPart
from mtp_dist.planner.activations import (
    element_bytes,
    has_attention_mask,
    hidden_bytes,
    local_tokens,
    micro_batch_tokens,
)
from mtp_dist.planner.parts import Parts, Passes, Stage
from mtp_dist.planner.weights import Weight, heads_have_embedding, layer_weights, local_vocab_size, stage_weights


@dataclass(frozen=True)
class StageCost:
    """Work of one rank of a pipeline stage. Passes are those of one micro-batch.

    A collective sends what a ring sends: of a tensor of b bytes on k ranks 2 * b * (k - 1) / k per rank for an
    all-reduce, half of it for an all-gather or a reduce-scatter.
    """

    forward_flops: float
    """FLOPs in the instruction ForwardPass. On the last stage the mode `eager` of the heads' loss runs their backward
    passes in it."""
    backward_flops: float
    """FLOPs in the instruction BackwardPass, with what activation checkpointing and the mode `recompute` run again."""
    forward_tensor_bytes: float
    """Bytes to the tensor-parallel ranks in the forward pass."""
    backward_tensor_bytes: float
    """Bytes to the tensor-parallel ranks in the backward pass."""
    next_stage_bytes: int
    """Bytes of activations to the next stage."""
    previous_stage_bytes: int
    """Bytes of gradients to the previous stage."""
    data_bytes: float
    """Bytes to the data-parallel ranks per step: the sum of the gradients, and the updated weights that ZeRO gathers;
    also the sum of a tied embedding's gradients on the first and the last stage."""


@dataclass(frozen=True)
class _Work:
    """FLOPs and tensor-parallel bytes of a part of a stage, forward, backward and of what is recomputed."""

    forward: float = 0
    backward: float = 0
    recomputed: float = 0
    forward_bytes: float = 0
    backward_bytes: float = 0
    recomputed_bytes: float = 0

    def __add__(self, other: "_Work") -> "_Work":
        return _Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, times: int) -> "_Work":
        return _Work(*(times * getattr(self, name) for name in self.__dataclass_fields__))

    def without_backward(self) -> "_Work":
        """Return the work of a part that is frozen and passes no gradient on."""
        return _Work(forward=self.forward, forward_bytes=self.forward_bytes)

    def in_loss_mode(self, mode: str) -> "_Work":
        """Return the work of heads under `heads.loss_mode`."""
        if mode == "naive":
            return self
        both = self.forward + self.backward + self.recomputed
        both_bytes = self.forward_bytes + self.backward_bytes + self.recomputed_bytes
        if mode == "eager":
            return _Work(forward=both, forward_bytes=both_bytes)
        return _Work(self.forward, both, forward_bytes=self.forward_bytes, backward_bytes=both_bytes)

    @property
    def flops(self) -> Passes:
        return Passes(self.forward, self.backward + self.recomputed)

    @property
    def bytes(self) -> Passes:
        return Passes(self.forward_bytes, self.backward_bytes + self.recomputed_bytes)


def part_flops(config: Config) -> Parts:
    """Return the FLOPs of one rank for a micro-batch, see `part_work`."""
    return part_work(config)[0]


def part_work(config: Config) -> tuple[Parts, Parts]:
    """Return the FLOPs of one rank for a micro-batch, and its bytes to the tensor-parallel ranks.

    FLOPs are those of the matrix products. The attention's are those of the causal half, unless documents are kept
    apart, which takes a mask; its backward pass has five products for the forward pass's two, as in FlashAttention.
    """
    layer, embedding = _layer(config, layer_weights(config, "trunk")), _embedding_work(config)
    if config.train.freezes_trunk:
        layer, embedding = layer.without_backward(), embedding.without_backward()
    head_1, later_head = (work.in_loss_mode(config.heads.loss_mode) for work in (_head_1(config), _later_head(config)))
    count, passes, low_rank = config.heads.count, backward_passes(config), config.train.low_rank
    input_grad = _first_input_flops(config, low_rank) if low_rank else 0
    return (
        Parts(embedding.flops, layer.flops, head_1.flops, later_head.flops, count, passes, input_grad),
        Parts(embedding.bytes, layer.bytes, head_1.bytes, later_head.bytes, count, passes),
    )


def backward_passes(config: Config) -> int:
    """Return how often a stage without heads runs backward for a micro-batch.

    DeepSpeed differentiates the tensors that a stage sends one by one, all the way to the beginning of the stage.
    """
    return 2 if config.heads.weighted_hidden_states and not config.heads.detach else 1


def stage_cost(config: Config, stage: int, trunk_layers: int, heads: int | None = None) -> StageCost:
    """Return the work of one rank of a pipeline stage, counted from 0, with a number of trunk layers.

    heads: number of the stage's heads; by default all on the last stage.
    """
    if heads is None:
        heads = config.heads.count if stage == config.parallel.stages - 1 else 0
    return _stage_cost(config, part_work(config), stage, Stage(trunk_layers, heads))


def stage_costs(config: Config, stages: Sequence[Stage]) -> list[StageCost]:
    """Return the work of one rank of each stage."""
    work, last, with_head_1 = part_work(config), len(stages) - 1, len(stages) - config.heads.stages
    found: dict[object, StageCost] = {}
    costs = []
    for index, stage in enumerate(stages):
        kind = stage, index == 0, index == with_head_1, index == last
        if kind not in found:
            found[kind] = _stage_cost(config, work, index, stage)
        costs.append(found[kind])
    return costs


def _stage_cost(config: Config, work: tuple[Parts, Parts], index: int, stage: Stage) -> StageCost:
    """Return the work of a stage from that of its parts."""
    is_first, is_last = index == 0, index == config.parallel.stages - 1
    has_head_1 = index == config.parallel.stages - config.heads.stages
    flops, tensor_bytes = (parts.stage(stage, is_first, has_head_1) for parts in work)
    sent = hidden_bytes(config) * (2 if config.heads.weighted_hidden_states else 1)
    return StageCost(
        forward_flops=flops.forward,
        backward_flops=flops.backward,
        forward_tensor_bytes=tensor_bytes.forward,
        backward_tensor_bytes=tensor_bytes.backward,
        next_stage_bytes=0 if is_last else sent,
        previous_stage_bytes=0 if is_first or config.train.freezes_trunk else sent,
        data_bytes=_data_bytes(config, index, stage.layers, stage.heads),
    )


def _products(weights: Iterable[Weight], tokens: int) -> _Work:
    """Return the work of multiplying each matrix with `tokens` positions; a frozen matrix has no gradient itself."""
    matrices = [weight for weight in weights if len(weight.shape) == 2]
    forward = sum(2 * tokens * weight.elements for weight in matrices)
    trained = sum(2 * tokens * weight.elements for weight in matrices if weight.is_trained)
    return _Work(forward=forward, backward=forward + trained)


def _layer(config: Config, weights: Iterable[Weight]) -> _Work:
    """Return the work of a transformer layer with these weights."""
    tokens, tensor = micro_batch_tokens(config), config.parallel.tensor
    weights = list(weights)
    products = _products(weights, tokens)
    attention = 4 * tokens * config.train.sequence_length * config.model.attention_size / tensor
    if not has_attention_mask(config):
        attention /= 2
    full = element_bytes(config) * tokens * config.model.hidden_size
    collective = _ring_bytes(full, tensor)
    mlp = sum(2 * tokens * weight.elements for weight in weights if "mlp." in weight.module and len(weight.shape) == 2)
    forward = products.forward + attention
    recomputed = {"none": 0.0, "selective": float(mlp), "full": forward}[config.train.activation_checkpointing]
    # Two all-reduces; under sequence parallelism two all-gathers and two reduce-scatters, and in the backward pass an
    # all-gather of each input for the weight's gradient.
    backward_bytes = (6 if config.parallel.sequence else 4) * collective
    return _Work(
        forward=forward,
        backward=products.backward + 2.5 * attention,
        recomputed=recomputed,
        forward_bytes=4 * collective,
        backward_bytes=backward_bytes,
        recomputed_bytes={"none": 0, "selective": 2, "full": 4}[config.train.activation_checkpointing] * collective,
    )


def _first_input_flops(config: Config, low_rank: LowRankConfig) -> float:
    """Return the FLOPs of the gradient of what the first layer's query-key-value matrix and its adapter read.

    They are not needed behind a frozen embedding.
    """
    qkv = (weight for weight in layer_weights(config, "trunk") if weight.module.endswith("linear_qkv"))
    matrix, *adapter = (weight for weight in qkv if len(weight.shape) == 2)
    read = matrix.elements + (adapter[0].elements if "linear_qkv" in low_rank.targets else 0)
    return 2 * micro_batch_tokens(config) * read


def _embedding_work(config: Config) -> _Work:
    """Return the work of an embedding: no products, the sum of the ranks' rows."""
    collective = _ring_bytes(
        element_bytes(config) * micro_batch_tokens(config) * config.model.hidden_size, config.parallel.tensor
    )
    if config.parallel.sequence:
        return _Work(forward_bytes=collective, backward_bytes=collective)
    return _Work(forward_bytes=2 * collective)


def _head_1(config: Config) -> _Work:
    """Return the work of head 1 and its losses."""
    heads = config.heads
    work = _unembedding(config, is_first=True)
    if heads.traits.first_head_has_block:
        work += _block(config, "head_1")
    if config.train.freezes_trunk:
        work = work.without_backward()
    if heads.token_order:
        order = _unembedding(config, is_first=False, is_trained=True)
        if config.train.freezes_trunk:  # its gradient ends at the matrix
            order = _Work(order.forward, order.forward, forward_bytes=order.forward_bytes)
        work += order
    return work


def _later_head(config: Config) -> _Work:
    """Return the work of one of heads 2..n and its losses."""
    work = _unembedding(config, is_first=False) + _block(config, "heads")
    if rank := condition_rank(config.heads, config.model.hidden_size):
        condition = Weight((config.model.hidden_size, rank), "heads", is_trained=True)
        work += _products([condition], local_tokens(config))
    return work


def _block(config: Config, part: ModelPart) -> _Work:
    """Return the work of one head's block."""
    layers, width = config.heads.block_layers, config.model.hidden_size
    is_trained = part == "heads" or not config.train.freezes_weights
    shapes = config.heads.traits.weights.values()
    own = [Weight(tuple(width * size for size in shape), part, is_trained) for shape in shapes]
    work = _layer(config, layer_weights(config, part)) * layers + _products(own, local_tokens(config))
    return work + _embedding_work(config) if config.heads.traits.embeds_tokens else work


def _unembedding(config: Config, is_first: bool, is_trained: bool | None = None) -> _Work:
    """Return the work of one unembedding and its loss."""
    tokens, hidden = micro_batch_tokens(config), config.model.hidden_size
    if is_trained is None:
        own = config.heads.unembedding == "separate" and not is_first
        is_trained = own or not config.train.freezes_weights
    if config.heads.detach == "full" and not is_first and config.heads.unembedding == "shared":
        is_trained = False
    products = _products([Weight((local_vocab_size(config), hidden), "heads", is_trained)], tokens)
    collective = _ring_bytes(element_bytes(config) * tokens * hidden, config.parallel.tensor)
    statistics = 20 * tokens * (config.parallel.tensor - 1)
    # The gradient of what the unembedding reads is summed over the ranks; under sequence parallelism it is scattered,
    # and what the unembedding reads gathered.
    return products + _Work(
        forward_bytes=statistics + (collective if config.parallel.sequence else 0),
        backward_bytes=(1 if config.parallel.sequence else 2) * collective,
    )


def _data_bytes(config: Config, stage: int, trunk_layers: int, heads: int) -> float:
    """Return the bytes to the data-parallel ranks per step."""
    weights = list(stage_weights(config, stage, trunk_layers, heads))
    trained = sum(weight.elements for weight in weights if weight.is_trained)
    bf16 = config.train.precision == "bf16"
    reduced = 2 if bf16 and config.parallel.grad_reduce_dtype == "bf16" else 4
    ring = 2 * _ring_bytes(reduced * trained, config.dp_size)
    if bf16 or config.parallel.zero_stage == 1:
        ring += _ring_bytes(element_bytes(config) * trained, config.dp_size)
    tied = [weight for weight in weights if weight.part == "embedding" and weight.is_trained]
    # With `dualpipev` one rank has the first and the last stage, and one embedding for both.
    if config.parallel.schedule == "1f1b" and config.parallel.pipeline > 1 and heads_have_embedding(config):
        stages = min(1 + config.heads.stages, config.parallel.pipeline)
        ring += sum(2 * _ring_bytes(4 * weight.elements, stages) for weight in tied)
    shared = [weight for weight in weights if weight.part == "unembedding" and weight.is_trained]
    return ring + sum(2 * _ring_bytes(4 * weight.elements, config.heads.stages) for weight in shared)


def _ring_bytes(size: float, ranks: int) -> float:
    """Return the bytes that a rank sends in an all-gather or a reduce-scatter of a tensor."""
    return size * (ranks - 1) / ranks
