"""Time that one micro-batch takes on each stage of a pipeline: FLOPs and bytes over the rates of a cluster."""

from typing import NamedTuple

from mtp_dist.config import Config, DeviceMemory, DeviceType
from mtp_dist.planner.devices import LAYER_FRACTION, Accelerator, Rates
from mtp_dist.planner.fit import Fit
from mtp_dist.planner.layouts import stays_within_nodes
from mtp_dist.planner.memory import USABLE_FRACTION, RankMemory
from mtp_dist.planner.parts import Passes


class Cluster(NamedTuple):
    """Accelerators of one type."""

    accelerator: Accelerator
    rates: Rates

    @property
    def device(self) -> DeviceType:
        """The type of device as PyTorch names it."""
        return "cpu" if self.accelerator.name == "cpu" else "cuda"

    @property
    def memory(self) -> DeviceMemory:
        """The memory of each rank's accelerator."""
        return DeviceMemory(self.device, self.accelerator.memory_bytes)

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
    world_size = config.world_size
    return AxisRates(
        tensor=rates.link if stays_within_nodes(tp_size, world_size, per_node) else rates.network,
        pipeline=rates.link if world_size <= per_node else rates.network,
        data=rates.link
        if stays_within_nodes(tp_size * config.dp_size, world_size, per_node)
        else min(rates.link, rates.network * max(1, per_node // tp_size)),
    )


class StageSeconds(NamedTuple):
    """Seconds of one rank of a stage per micro-batch, by what takes them."""

    compute: Passes
    tensor: Passes
    """Tensor-parallel communication."""
    sums: float
    """Adding the gradients to those of other micro-batches, in the backward pass."""

    @property
    def passes(self) -> Passes:
        return Passes(
            self.compute.forward + self.tensor.forward, self.compute.backward + self.tensor.backward + self.sums
        )


def flop_seconds(cluster: Cluster) -> float:
    """Return the seconds per FLOP of a layer."""
    return 1 / (LAYER_FRACTION * cluster.rates.matmul)


def stage_seconds(fit: Fit, cluster: Cluster) -> list[StageSeconds]:
    """Return the time of each stage per micro-batch."""
    config, rates = fit.config, cluster.rates
    per_flop, per_byte = flop_seconds(cluster), 1 / axis_rates(config, cluster).tensor
    seconds = []
    for stage, cost in enumerate(fit.costs):
        rank = min(stage, config.parallel.stages - 1 - stage) if fit.halves else stage
        memory = fit.rank_with_weights_of(rank).memory
        # Of a rank's two stages each sums about half of its gradients.
        sums = gradient_sum_bytes(memory) / rates.memory / (2 if fit.halves else 1)
        seconds.append(
            StageSeconds(
                Passes(cost.forward_flops, cost.backward_flops).scaled(per_flop),
                Passes(cost.forward_tensor_bytes, cost.backward_tensor_bytes).scaled(per_byte),
                sums,
            )
        )
    return seconds


def update_bytes(memory: RankMemory) -> int:
    """Return the bytes that the update reads and writes: the state twice, the gradients for norm, clipping and use."""
    return 2 * memory.optimizer + 3 * (memory.accumulators or memory.gradients) + memory.parameters


def gradient_sum_bytes(memory: RankMemory) -> int:
    """Return the bytes that a micro-batch reads and writes to add its gradients to those of the others."""
    return 2 * (memory.gradients + memory.accumulators)
