"""Memory of one rank in a training step, by component."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mtp_dist.config import Config
from mtp_dist.planner.activations import (
    element_bytes,
    embedding_workspace,
    hidden_bytes,
    layer_workspace,
    micro_batch_tokens,
    stage_activations,
)
from mtp_dist.planner.head_memory import head_loss_memory
from mtp_dist.planner.weights import Weight, stage_weights

BYTES_PER_TOKEN = 8
"""Size of an int64 token id."""
REDUCE_BUCKET = 50_000_000
"""Elements of the buffer in which ZeRO-1 reduces fp32 gradients. DeepSpeed's default of 500 million allocates 2 GB for
the smallest model."""
ALLREDUCE_BUCKET = 500_000_000
"""Elements from which on DeepSpeed reduces gradients in several parts, without ZeRO and in its bf16 optimizer."""
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
    parallelism, and two for the gradients that ZeRO 1 reduces in fp32, one of which the update needs only."""
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
    device: Literal["cpu", "cuda"] = "cuda",
    heads: int | None = None,
) -> RankMemory:
    """Return the memory of a rank of a pipeline stage, counted from 0, that holds so many trunk layers.

    in_flight: micro-batches whose activations the stage keeps at once. heads: number of the stage's heads; by default
    all on the last stage. The libraries' own memory, such as that of the CUDA context and of NCCL, is not counted.
    """
    if heads is None:
        heads = config.heads.count if stage == config.parallel.stages - 1 else 0
    weights = list(stage_weights(config, stage, trunk_layers, heads))
    trained = [weight for weight in weights if weight.is_trained]
    size, bf16 = element_bytes(config), config.train.precision == "bf16"
    sharded = bf16 or config.parallel.zero_stage == 1
    partitions = [group // (config.dp_size if sharded else 1) for group in _groups(config, trained)]
    is_first, is_last = stage == 0, stage == config.parallel.stages - 1
    activations = stage_activations(config, stage, trunk_layers, device)
    head_loss = head_loss_memory(_with_heads(config, heads), device) if heads else None
    workspace = layer_workspace(config, device, "trunk") if trunk_layers and not config.train.freezes_trunk else 0
    if is_first and not config.train.freezes_weights:
        workspace = max(workspace, embedding_workspace(config) - activations)
    parameters, gradients = size * _elements(weights), size * _elements(trained)
    accumulators = 4 * _elements(trained) if bf16 else 0
    optimizer = sum(partitions) * (MOMENT_BYTES + (MASTER_BYTES if sharded else 0))
    communication = _buffers(config, is_first, is_last)
    buckets = 4 * REDUCE_BUCKET if config.train.precision == "fp32" and config.parallel.zero_stage == 1 else 0
    owned = [weight for weight in trained if is_first or weight.part != "embedding"]
    update = _update_bytes(config, trained, owned, partitions, device)
    peak_extra = max(workspace + (head_loss.waiting if head_loss else 0), head_loss.peak if head_loss else 0)
    if head_loss and not is_last:
        peak_extra += (in_flight - 1) * head_loss.waiting  # each micro-batch's, until its backward pass
    passes = in_flight * activations + gradients + peak_extra
    if config.micro_batches <= in_flight:  # the first backward pass, which makes the gradients, frees a micro-batch
        passes = max(in_flight * activations + peak_extra, passes - activations)
    return RankMemory(
        parameters=parameters,
        gradients=gradients,
        accumulators=accumulators,
        optimizer=optimizer,
        communication=communication + 2 * buckets,
        activations=in_flight * activations,
        workspace=workspace,
        head_loss=head_loss.peak if head_loss else 0,
        update=update,
        # The gradients move into ZeRO's second bucket.
        total=parameters
        + accumulators
        + optimizer
        + communication
        + max(buckets + passes, 2 * buckets + (max(gradients, update) if buckets else gradients + update)),
    )


def _with_heads(config: Config, heads: int) -> Config:
    return config.model_copy(update={"heads": config.heads.model_copy(update={"count": heads})})


def step_token_bytes(config: Config) -> int:
    """Return the bytes of one step's samples on one data-parallel rank."""
    samples = config.train.global_batch_size // config.dp_size
    return samples * (config.train.sequence_length + config.heads.lookahead) * BYTES_PER_TOKEN


def _elements(weights: Iterable[Weight]) -> int:
    return sum(weight.elements for weight in weights)


def _groups(config: Config, trained: list[Weight]) -> list[int]:
    """Return the elements of each of the optimizer's groups, padded as DeepSpeed does before it shards them."""
    groups: dict[object, int] = {}
    for weight in trained:
        key = len(weight.shape) <= 1, config.optimizer.multiplier(weight.part)
        groups[key] = groups.get(key, 0) + weight.elements
    multiple = 2 * config.dp_size
    return [-(-elements // multiple) * multiple for elements in groups.values()]


def _buffers(config: Config, is_first: bool, is_last: bool) -> int:
    """Return the bytes of the buffers that stay from step to step."""
    states = 2 if config.heads.weighted_hidden_states else 1
    # Activations and gradients arrive in the same buffers.
    receives = not is_first or not (is_last or config.train.freezes_trunk)
    received = states * hidden_bytes(config) if receives else 0
    if config.parallel.sequence:
        received += element_bytes(config) * micro_batch_tokens(config) * config.model.hidden_size
    return received


def _update_bytes(
    config: Config, trained: list[Weight], owned: list[Weight], partitions: list[int], device: str
) -> int:
    """Return the temporary bytes of reducing and clipping the gradients and of updating the weights.

    owned: weights of which the rank adds the gradients to their norm.
    """
    if not trained:
        return 0
    elements = _elements(trained)
    # PyTorch's AdamW for CPUs has two temporary tensors of a weight's size; the fused ones of GPUs have none.
    if config.train.precision == "fp32" and config.parallel.zero_stage == 1:
        return 2 * 4 * sum(partitions)  # a copy of the rank's partition, and a flat one
    if config.train.precision == "bf16":
        copied = elements if elements <= ALLREDUCE_BUCKET else 0
        reduced = 2 * elements if config.parallel.grad_reduce_dtype == "bf16" else 0
        return max(4 * copied + reduced, 8 * max(partitions) if device == "cpu" else 0)
    # Clipping squares the gradients in fp64, one at a time.
    squared = 2 * 8 * max((weight.elements for weight in owned), default=0)
    return max(4 * min(elements, ALLREDUCE_BUCKET), squared)
