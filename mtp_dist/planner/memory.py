"""Memory of one rank in a training step, by component."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mtp_dist.config import Config
from mtp_dist.planner.activations import element_bytes, hidden_bytes, layer_activations, stage_activations
from mtp_dist.planner.head_memory import head_loss_bytes
from mtp_dist.planner.weights import Weight, stage_weights

BYTES_PER_TOKEN = 8
"""Size of an int64 token id."""
REDUCE_BUCKET = 50_000_000
"""Elements of the buffer in which ZeRO-1 reduces fp32 gradients. DeepSpeed's default of 500 million allocates 2 GB for
the smallest model."""
MASTER_BYTES, MOMENT_BYTES = 4, 8
"""Bytes per parameter of an fp32 master weight and of Adam's two fp32 moments."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage, by component, each at its own peak within a training step.

    The first five are there throughout the step, `update` after the last backward pass only, when no activations are
    left.
    """

    parameters: int
    gradients: int
    """Gradients of the parameters in their own precision; in fp32 they accumulate over the micro-batches."""
    accumulators: int
    """fp32 sums of the bf16 gradients over the micro-batches (DeepSpeed's BF16_Optimizer)."""
    optimizer: int
    """Master weights and moments, sharded over the data-parallel ranks in bf16 and with ZeRO 1."""
    communication: int
    """Buffers in which activations and their gradients arrive from the neighbouring stages."""
    activations: int
    """What the backward passes of all micro-batches in flight need."""
    workspace: int
    """Temporary tensors of one layer's backward pass, with its activations if they are recomputed."""
    head_loss: int
    """The heads' loss on the last stage: one head's activations, the logits of a chunk and their gradient, and the
    gradients that wait for the backward pass."""
    update: int
    """Buckets of the gradient reduction, or temporary tensors of the optimizer if they are larger."""

    @property
    def state(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.parameters + self.gradients + self.accumulators + self.optimizer

    @property
    def total(self) -> int:
        """Bytes at the step's peak."""
        passes = self.activations + max(self.workspace, self.head_loss)
        return self.state + self.communication + max(passes, self.update)


def rank_memory(
    config: Config, stage: int, trunk_layers: int, in_flight: int, device: Literal["cpu", "cuda"] = "cuda"
) -> RankMemory:
    """Return the memory of a rank of a pipeline stage, counted from 0, that holds so many trunk layers.

    in_flight: micro-batches whose activations the stage keeps at once. The libraries' own memory, such as that of
    the CUDA context and of NCCL, is not counted.
    """
    weights = list(stage_weights(config, stage, trunk_layers))
    trained = [weight for weight in weights if weight.is_trained(config)]
    size, bf16 = element_bytes(config), config.train.precision == "bf16"
    sharded = bf16 or config.parallel.zero_stage == 1
    held = sum(group // (config.dp_size if sharded else 1) for group in _groups(config, trained))
    is_last = stage == config.parallel.stages - 1
    trained_elements = _elements(trained)
    return RankMemory(
        parameters=size * _elements(weights),
        gradients=size * trained_elements,
        accumulators=4 * trained_elements if bf16 else 0,
        optimizer=held * (MOMENT_BYTES + (MASTER_BYTES if sharded else 0)),
        communication=((stage > 0) + (not is_last)) * hidden_bytes(config) if config.parallel.pipeline > 1 else 0,
        activations=in_flight * stage_activations(config, stage, trunk_layers, device),
        workspace=layer_activations(config, device) if config.train.activation_checkpointing != "none" else 0,
        head_loss=head_loss_bytes(config, device) if is_last else 0,
        update=_update_bytes(config, trained, device),
    )


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


def _update_bytes(config: Config, trained: list[Weight], device: str) -> int:
    """Return the temporary bytes of reducing the gradients, or of the optimizer if they are more."""
    elements = _elements(trained)
    if config.train.precision == "fp32" and config.parallel.zero_stage == 1:
        return 4 * REDUCE_BUCKET
    return 4 * elements
