"""Time that one micro-batch takes on each stage of a pipeline: FLOPs and bytes over the rates of a cluster."""

from collections.abc import Iterator
from typing import NamedTuple

from mtp_dist.config import Config
from mtp_dist.planner.activations import element_bytes
from mtp_dist.planner.devices import LAYER_FRACTION, Accelerator, Rates
from mtp_dist.planner.fit import DeviceType, Fit
from mtp_dist.planner.memory import RankMemory
from mtp_dist.planner.parts import Parts, Passes, Stage, part_flops

USABLE_FRACTION = 0.9
"""Fraction of the memory that a proposed layout may need: estimates are within 10% of what was measured."""


class Cluster(NamedTuple):
    """Accelerators of one type."""

    accelerator: Accelerator
    rates: Rates

    @property
    def device(self) -> DeviceType:
        """The type of device as PyTorch names it."""
        return "cpu" if self.accelerator.name == "cpu" else "cuda"

    @property
    def usable_bytes(self) -> float:
        """Memory that a proposed layout may need."""
        return USABLE_FRACTION * self.accelerator.memory_bytes


class AxisRates(NamedTuple):
    """Bytes per second and rank of the transfers of each axis."""

    tensor: float
    pipeline: float
    data: float


def axis_rates(config: Config, cluster: Cluster) -> AxisRates:
    """Return the rates of each axis. Tensor-parallel ranks are neighbours, then data-parallel ones, then the stages.

    A group with several ranks per node has the network of all of them.
    """
    tp_size, rates, per_node = config.parallel.tensor, cluster.rates, cluster.accelerator.per_node
    return AxisRates(
        tensor=rates.link if tp_size <= per_node else rates.network,
        pipeline=rates.link if config.world_size <= per_node else rates.network,
        data=rates.link
        if tp_size * config.dp_size <= per_node
        else min(rates.link, rates.network * max(1, per_node // tp_size)),
    )


class PartSeconds(NamedTuple):
    """Seconds of the parts of a model on one rank per micro-batch, by what takes them."""

    compute: Parts
    tensor: Parts
    """Tensor-parallel communication."""


def part_seconds(config: Config, cluster: Cluster) -> PartSeconds:
    """Return the time of each part of the model."""
    train, flops = config.train, part_flops(config)
    positions = train.micro_batch_size * train.sequence_length / config.parallel.tensor
    layer, heads = tensor_parallel_bytes(config)
    sent = Parts(Passes(0, 0), layer, heads, flops.num_heads)
    return PartSeconds(
        flops.scaled(positions / (LAYER_FRACTION * cluster.rates.matmul)),
        sent.scaled(1 / axis_rates(config, cluster).tensor),
    )


def stage_passes(fit: Fit, cluster: Cluster) -> Iterator[Passes]:
    """Yield the seconds of each stage per micro-batch."""
    config, parts = fit.config, part_seconds(fit.config, cluster)
    ranks, stages = config.parallel.pipeline, config.parallel.stages
    for index, layers in enumerate(fit.split):
        stage = Stage(layers, parts.compute.num_heads * (index == stages - 1))
        compute, tensor = (each.stage(stage, index == 0) for each in parts)
        rank = index if index < ranks else stages - 1 - index
        # Of a rank's two stages each sums about half of its gradients.
        sums = gradient_sum_bytes(fit.alike(rank).memory) * ranks / stages / cluster.rates.memory
        yield Passes(compute.forward + tensor.forward, compute.backward + tensor.backward + sums)


def tensor_parallel_bytes(config: Config) -> tuple[Passes, Passes]:
    """Return the bytes that a rank sends per micro-batch for one trunk layer, and for all heads.

    An all-reduce over t ranks sends 2 (t - 1) / t of the hidden states. With sequence parallelism it is split into
    reduce-scatter and all-gather, and the backward pass gathers its input once more.
    """
    heads, size, train = config.heads, config.parallel.tensor, config.train
    hidden = element_bytes(config) * train.micro_batch_size * train.sequence_length * config.model.hidden_size
    all_reduce = 2 * (size - 1) / size * hidden
    recomputed = {"none": 0, "selective": 1, "full": 2}[train.activation_checkpointing]
    forward, backward = 2 * all_reduce, ((3 if config.parallel.sequence else 2) + recomputed) * all_reduce
    blocks = heads.num_blocks * heads.block_layers
    unembeddings = heads.count * all_reduce
    # The heads' backward passes are in the forward pass, or recompute it.
    heads_backward = blocks * (backward + (forward if heads.loss_mode == "recompute" else 0)) + unembeddings
    in_forward = heads_backward if heads.loss_mode == "eager" else 0
    layer = Passes(forward, 0 if train.freezes_trunk else backward)
    return layer, Passes(blocks * forward + in_forward, heads_backward - in_forward)


def data_parallel_bytes(config: Config, gradients: int) -> float:
    """Return the bytes that a rank sends to sum its gradients and, if the optimizer is sharded, to gather the weights.

    gradients: bytes of a rank's gradients, which are as large as its trained weights.
    """
    size, bf16 = config.dp_size, config.train.precision == "bf16"
    reduced = gradients * (2 if bf16 and config.parallel.grad_reduce_dtype == "fp32" else 1)
    gathered = gradients if bf16 or config.parallel.zero_stage else 0
    return (size - 1) / size * (2 * reduced + gathered)


def update_bytes(memory: RankMemory) -> int:
    """Return the bytes that the update reads and writes: the state twice, the gradients for norm, clipping and use."""
    return 2 * memory.optimizer + 3 * (memory.accumulators or memory.gradients) + memory.parameters


def gradient_sum_bytes(memory: RankMemory) -> int:
    """Return the bytes that a micro-batch reads and writes to add its gradients to those of the others."""
    return 2 * (memory.gradients + memory.accumulators)
