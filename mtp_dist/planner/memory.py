"""Memory of one rank in a training step, by component."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from mtp_dist.config import Config, DeviceType
from mtp_dist.planner.activations import (
    element_bytes,
    embedding_workspace,
    forward_workspace,
    hidden_bytes,
    layer_workspace,
    micro_batch_tokens,
    stage_activations,
)
from mtp_dist.planner.head_memory import head_loss_memory
from mtp_dist.planner.layouts import replace_values
from mtp_dist.planner.parts import Stage
from mtp_dist.planner.schedule import in_flight_peaks, schedule_name
from mtp_dist.planner.weights import Weight, stage_weights

BYTES_PER_TOKEN = 8
"""Size of an int64 token id."""
LARGEST_REDUCE_BUCKET = 50_000_000
"""Largest number of elements of the buffer in which ZeRO 1 reduces fp32 gradients."""
ALLREDUCE_BUCKET = 500_000_000
"""Elements from which on DeepSpeed reduces gradients in several parts, without ZeRO and in its bf16 optimizer."""
USABLE_FRACTION = 0.9
"""Fraction of the memory that a split or a proposed layout may need: estimates are within 10% of what was measured."""
MASTER_BYTES, MOMENT_BYTES = 4, 8
"""Bytes per parameter of an fp32 master weight and of Adam's two fp32 moments."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage, by component, each at its own peak within a training step.

    `activations` to `head_loss` are those of the forward and backward passes, `update` is what follows them.
    """

    parameters: int
    gradients: int
    """Gradients of the parameters in their own precision; in fp32 they accumulate over the micro-batches."""
    accumulators: int
    """fp32 sums of the bf16 gradients over the micro-batches (DeepSpeed's BF16_Optimizer)."""
    optimizer: int
    """Master weights and moments, sharded over the data-parallel ranks in bf16 and with ZeRO 1."""
    communication: int
    """Buffers for the tensors of neighbouring stages, for the sequence that tensor-parallel ranks gather under sequence
    parallelism, and for the gradients that ZeRO 1 reduces in fp32."""
    activations: int
    """What the backward passes of all micro-batches in flight need."""
    workspace: int
    """What a layer's backward pass needs in addition, recomputed activations included."""
    head_loss: int
    """The heads' loss on the last stage: one head's activations, the logits of a chunk and their gradient, and the
    gradients that wait for the backward pass."""
    update: int
    """Copies of gradients for their reduction, or temporary tensors of clipping and of the optimizer."""
    total: int
    """Peak of their sum. They are not all in memory at once: no gradients before the first backward pass, no
    activations in the update."""

    @property
    def state(self) -> int:
        """Bytes of parameters, gradients and optimizer, which do not depend on the batch."""
        return self.parameters + self.gradients + self.accumulators + self.optimizer


def rank_memory(
    config: Config,
    stage: int,
    trunk_layers: int,
    in_flight: int,
    device: DeviceType = "cuda",
    heads: int | None = None,
) -> RankMemory:
    """Return the memory of a rank of a pipeline stage, counted from 0, with a number of trunk layers.

    in_flight: micro-batches whose activations the stage keeps at once. heads: number of the stage's heads; by default
    all on the last stage. The libraries' own memory, such as that of the CUDA context and of NCCL, is not counted.
    """
    if heads is None:
        heads = config.heads.count if stage == config.parallel.stages - 1 else 0
    return rank_needs(config, [stage], [Stage(trunk_layers, heads)], device).memory([(in_flight,)])


def pipeline_rank_memory(config: Config, rank: int, stages: Sequence[Stage], device: DeviceType) -> RankMemory:
    """Return the memory of a pipeline rank with its one stage, or with its two of `dualpipev`."""
    needs = rank_needs(config, config.parallel.rank_stages(rank), stages, device)
    return needs.memory(in_flight(config, rank))


def in_flight(config: Config, rank: int) -> list[tuple[int, int]]:
    """Return the micro-batches in flight on each stage of a pipeline rank, see `in_flight_peaks`."""
    return in_flight_peaks(schedule_name(config), rank, config.parallel.pipeline, config.micro_batches)


class _StageNeeds(NamedTuple):
    """What one stage of a rank needs besides its weights."""

    activations: int
    """Those of one micro-batch."""
    workspace: int
    head_peak: int
    """Peak of the heads' loss."""
    waiting: int
    """Gradients of the heads that wait for the backward pass, per micro-batch."""


def _stage_needs(config: Config, index: int, stage: Stage, device: DeviceType) -> _StageNeeds:
    activations = stage_activations(config, index, stage.layers, device)
    workspace = 0
    if stage.layers:
        frozen = config.train.freezes_trunk
        workspace = forward_workspace(config) if frozen else layer_workspace(config, device, "trunk")
    if index == 0 and not config.train.freezes_weights:
        workspace = max(workspace, embedding_workspace(config) - activations)
    if not stage.heads:
        return _StageNeeds(activations, workspace, 0, 0)
    head_loss = head_loss_memory(replace_values(config, {"heads.count": stage.heads}), device)
    return _StageNeeds(activations, workspace, head_loss.peak, head_loss.waiting)


@dataclass(frozen=True)
class RankNeeds:
    """What a rank needs at any number of micro-batches in flight. The passes of its stages do not overlap."""

    stages: tuple[_StageNeeds, ...]
    micro_batches: int
    """Micro-batches per step."""
    parameters: int
    gradients: int
    accumulators: int
    optimizer: int
    buffers: int
    bucket: int
    """The buffer in which ZeRO 1 reduces fp32 gradients; the first backward pass allocates it."""
    update: int
    after_passes: int
    """Peak after the passes, with the gradients."""

    def memory(self, in_flight: Iterable[Sequence[int]]) -> RankMemory:
        """Return the memory of the rank.

        in_flight: micro-batches whose activations each stage keeps, at all moments at which it can be at its peak.
        """
        activations = head_loss = passes = 0
        for counts in in_flight:
            numbered = list(zip(counts, self.stages, strict=False))
            kept = sum(count * stage.activations for count, stage in numbered)
            waiting = sum(max(0, count - 1) * stage.waiting for count, stage in numbered)
            forward = waiting + max(stage.head_peak for stage in self.stages)
            backward = waiting + max(stage.workspace + stage.waiting for stage in self.stages)
            needed = kept + self.gradients + self.bucket + max(forward, backward)
            if self.micro_batches <= counts[0]:
                # The first backward pass, which makes the gradients and the bucket, frees a micro-batch.
                needed = max(needed - self.stages[0].activations, kept + forward, kept + self.bucket + backward)
            activations, head_loss, passes = max(activations, kept), max(head_loss, forward), max(passes, needed)
        return RankMemory(
            parameters=self.parameters,
            gradients=self.gradients,
            accumulators=self.accumulators,
            optimizer=self.optimizer,
            communication=self.buffers + self.bucket,
            activations=activations,
            workspace=max(stage.workspace for stage in self.stages),
            head_loss=head_loss,
            update=self.update,
            total=self.parameters + self.accumulators + self.optimizer + self.buffers + max(passes, self.after_passes),
        )


def rank_needs(config: Config, indices: Sequence[int], stages: Sequence[Stage], device: DeviceType) -> RankNeeds:
    """Return what a rank needs that has these stages. indices: their positions in the pipeline, from 0."""
    parts = list(zip(indices, stages, strict=True))
    in_order = [weight for index, stage in parts for weight in stage_weights(config, index, *stage)]
    weights = Counter(in_order)
    trained = Counter({weight: count for weight, count in weights.items() if weight.is_trained})
    size, bf16 = element_bytes(config), config.train.precision == "bf16"
    sharded = bf16 or config.parallel.zero_stage == 1
    groups = _groups(config, trained.items())
    partitions = [_padded(config, group) // (config.dp_size if sharded else 1) for group in groups]
    elements = _elements(trained)
    if sharded and not bf16:
        bucket = 4 * reduce_bucket(elements)
        ordered = _groups(config, ((weight, 1) for weight in in_order if weight.is_trained))
        update, after_passes = _zero_update_bytes(ordered, partitions, device)
    else:
        bucket, update = 0, _update_bytes(config, trained, _owned(config, indices, trained), partitions, device)
        after_passes = size * elements + update
    return RankNeeds(
        stages=tuple(_stage_needs(config, index, stage, device) for index, stage in parts),
        micro_batches=config.micro_batches,
        parameters=size * _elements(weights),
        gradients=size * elements,
        accumulators=4 * elements if bf16 else 0,
        optimizer=sum(partitions) * (MOMENT_BYTES + (MASTER_BYTES if sharded else 0)),
        buffers=_buffers(config, indices),
        bucket=bucket,
        update=update,
        after_passes=after_passes,
    )


def step_token_bytes(config: Config) -> int:
    """Return the bytes of one step's samples on one data-parallel rank."""
    samples = config.train.global_batch_size // config.dp_size
    return samples * (config.train.sequence_length + config.heads.lookahead) * BYTES_PER_TOKEN


def _elements(weights: Counter[Weight]) -> int:
    return sum(count * weight.elements for weight, count in weights.items())


def reduce_bucket(trained: int) -> int:
    """Return the elements of the buffer in which ZeRO 1 reduces fp32 gradients. trained: elements of all of them.

    DeepSpeed allocates all of it, even if fewer would do: 2 GB at its default of 500 million.
    """
    return min(trained, LARGEST_REDUCE_BUCKET)


def _owned(config: Config, indices: Sequence[int], trained: Iterable[Weight]) -> list[Weight]:
    """Return the weights of which the rank adds the gradients to their norm: of replicas, those of one stage."""
    elsewhere = set()
    if 0 not in indices:
        elsewhere.add("embedding")
    if config.parallel.stages - config.heads.stages not in indices:
        elsewhere.add("unembedding")
    return [weight for weight in trained if weight.part not in elsewhere]


def _groups(config: Config, trained: Iterable[tuple[Weight, int]]) -> list[list[int]]:
    """Return the elements of each weight of each of the optimizer's groups. trained: weights and how often each is."""
    groups: dict[object, list[int]] = {}
    for weight, count in trained:
        key = len(weight.shape) <= 1, config.optimizer.multiplier(weight.part)
        groups.setdefault(key, []).append(count * weight.elements)
    return list(groups.values())


def _padded(config: Config, group: Iterable[int]) -> int:
    """Return the elements of a group, padded as DeepSpeed does before it shards them."""
    multiple = 2 * config.dp_size
    return -(-sum(group) // multiple) * multiple


def _kept_elements(group: Sequence[int], partition: int) -> int:
    """Return the elements of the weights of which a data-parallel rank updates a part, on the rank with the most."""
    ends, most = [*accumulate(group)], 0
    for start, end in zip([0, *ends], ends, strict=False):
        last = (end - 1) // partition * partition  # where the last partition begins that does so in this weight
        if last >= start:
            most = max(most, ends[min(bisect_left(ends, last + partition), len(ends) - 1)] - start)
    return most


def _buffers(config: Config, indices: Sequence[int]) -> int:
    """Return the bytes of the buffers that stay from step to step, of a rank with these stages."""
    states, last = 2 if config.heads.weighted_hidden_states else 1, config.parallel.stages - 1
    # Activations and gradients arrive in the same buffers.
    receiving = [index > 0 or not (index == last or config.train.freezes_trunk) for index in indices]
    count = sum(receiving)
    if len(indices) == 2 and indices[1] - indices[0] > 1:
        count += 1  # the gradient of the last backward pass of DualPipeV's stage is freed only with the next one
    received = count * states * hidden_bytes(config)
    if config.parallel.sequence:
        received += element_bytes(config) * micro_batch_tokens(config) * config.model.hidden_size
    return received


def _update_bytes(
    config: Config, trained: Counter[Weight], owned: list[Weight], partitions: list[int], device: str
) -> int:
    """Return the temporary bytes of reducing and clipping the gradients and of updating the weights.

    owned: weights of which the rank adds the gradients to their norm.
    """
    if not trained:
        return 0
    elements = _elements(trained)
    # PyTorch's AdamW for CPUs has two temporary tensors of a weight's size; the fused ones of GPUs have none.
    if config.train.precision == "bf16":
        copied = elements if elements <= ALLREDUCE_BUCKET else 0
        reduced = 2 * elements if config.parallel.grad_reduce_dtype == "bf16" else 0
        return max(4 * copied + reduced, 8 * max(partitions) if device == "cpu" else 0)
    # Clipping squares the gradients in fp64, one at a time.
    squared = 2 * 8 * max((weight.elements for weight in owned), default=0)
    return max(4 * min(elements, ALLREDUCE_BUCKET), squared)


def _zero_update_bytes(groups: list[list[int]], partitions: Sequence[int], device: str) -> tuple[int, int]:
    """Return the temporary bytes of reducing the gradients with ZeRO 1 in fp32 and of updating the weights, and the
    peak of these bytes with the gradients and the bucket of the backward passes.

    groups: see `_groups`, in the order of the weights. partitions: elements of each group that the rank updates.
    """
    elements, largest = sum(map(sum, groups)), max((max(group) for group in groups), default=0)
    bucket, partition = reduce_bucket(elements), max(partitions, default=0)
    # Of each weight of which the rank updates a part it copies the whole gradient, after each bucket.
    kept = sum(map(_kept_elements, groups, partitions))
    kept_early = kept if elements > bucket else 0
    # DeepSpeed allocates a second bucket that it does not use, and a flat copy of what it sums at once.
    flat = max(bucket, largest)
    # The norm is one of fp64. PyTorch's AdamW for CPUs has two temporary tensors of the size of the weights.
    step = kept + max(2 * min(largest, partition), partition * (3 if device == "cpu" else 1))
    # The gradients move into the bucket, and those that the rank does not update are freed before the step.
    return 4 * max(bucket + flat + kept_early, step), 4 * max(elements + flat + max(bucket, kept_early), step)
