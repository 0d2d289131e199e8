"""Time of a training step, and what it goes into."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from mtp_dist.config import Config
from mtp_dist.config.schema import ParallelConfig
from mtp_dist.planner.activations import hidden_bytes
from mtp_dist.planner.fit import Fit
from mtp_dist.planner.flops import model_flops_per_token
from mtp_dist.planner.parts import Passes
from mtp_dist.planner.schedule import ScheduleName, Timeline, instructions, simulate
from mtp_dist.planner.stage_times import (
    Cluster,
    axis_rates,
    data_parallel_bytes,
    gradient_sum_bytes,
    part_seconds,
    stage_passes,
    update_bytes,
)


@dataclass(frozen=True)
class StepEstimate:
    """The estimated time of one training step."""

    fit: Fit
    cluster: Cluster
    passes: tuple[Passes, ...]
    """Seconds of each stage per micro-batch, tensor-parallel communication included."""
    transfer: float
    """Seconds of one transfer between neighbouring stages."""
    pipeline: float
    """Seconds of all micro-batches."""
    data: float
    """Seconds in which the slowest ranks sum gradients over the data-parallel ranks and gather weights."""
    update: float
    """Seconds of the optimizer on the slowest ranks."""

    @property
    def seconds(self) -> float:
        """Seconds per step."""
        return self.pipeline + self.data + self.update

    @property
    def tokens_per_second(self) -> float:
        train = self.fit.config.train
        return train.global_batch_size * train.sequence_length / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the FLOPs of `model_flops_per_token` per second, relative to the peak."""
        config = self.fit.config
        peak = config.world_size * self.cluster.accelerator.peak_flops(config.train.precision)
        return self.tokens_per_second * model_flops_per_token(config, config.heads.count) / peak

    @property
    def balance(self) -> float:
        """Mean work of the pipeline ranks relative to the slowest one's: no rank can work for more of the time."""
        work = _rank_seconds(self.passes, self.fit.config.parallel)
        return sum(work) / (len(work) * max(work))


def estimate(fit: Fit, cluster: Cluster, simulated: bool = True) -> StepEstimate:
    """Return the time of a step.

    simulated: False replaces the timeline of the micro-batches by a formula, for the comparison of many layouts: the
    first micro-batch passes all stages, then the slowest rank never waits. For 1F1B it is a lower bound.
    """
    config, rates = fit.config, axis_rates(fit.config, cluster)
    passes = tuple(stage_passes(fit, cluster))
    transfer = hidden_bytes(config) / rates.pipeline if config.parallel.pipeline > 1 else 0.0
    if simulated:
        pipeline = _simulated_seconds(config, passes, transfer)
    else:
        slowest = max(_rank_seconds(passes, config.parallel))
        pipeline = sum(each.total for each in passes) + (config.micro_batches - 1) * slowest
    return StepEstimate(
        fit,
        cluster,
        passes,
        transfer,
        pipeline,
        data=max(data_parallel_bytes(config, rank.memory.gradients) for rank in fit.kinds.values()) / rates.data,
        update=max(update_bytes(rank.memory) for rank in fit.kinds.values()) / cluster.rates.memory,
    )


def timeline(step: StepEstimate, micro_batches: int) -> Timeline:
    """Return the timeline of a step with so many micro-batches."""
    return simulate(step.fit.config.parallel.schedule, step.passes, micro_batches, step.transfer)


def _simulated_seconds(config: Config, passes: Sequence[Passes], transfer: float) -> float:
    """Return the time of all micro-batches. From some number on, each further one takes equally long."""
    schedule, ranks, micro_batches = config.parallel.schedule, config.parallel.pipeline, config.micro_batches
    if ranks == 1:
        return micro_batches * passes[0].total
    few, more = 3 * ranks, 4 * ranks
    if micro_batches <= more:
        return simulate(schedule, passes, micro_batches, transfer).seconds
    after_few, after_more = (simulate(schedule, passes, count, transfer).seconds for count in (few, more))
    return after_more + (micro_batches - more) * (after_more - after_few) / (more - few)


def _rank_seconds(passes: Sequence[Passes], parallel: ParallelConfig) -> list[float]:
    """Return the time of each pipeline rank per micro-batch."""
    return [sum(passes[stage].total for stage in parallel.rank_stages(rank)) for rank in range(parallel.pipeline)]


def time_by_part(step: StepEstimate) -> dict[str, float]:
    """Return what a step's seconds go into, as the mean over the ranks of the pipeline."""
    config, cluster = step.fit.config, step.cluster
    ranks, micro_batches = config.parallel.pipeline, config.micro_batches
    each = micro_batches / ranks
    parts = part_seconds(config, cluster)
    without = part_seconds(_without_recomputation(config), cluster)
    layers = config.model.trunk_layers
    trunk, heads = layers * without.compute.layer.total, without.compute.heads.total
    all_compute = layers * parts.compute.layer.total + parts.compute.heads.total
    seconds = {
        "trunk layers": each * trunk,
        "heads and their loss": each * heads,
        "recomputation": each * (all_compute - trunk - heads),
        "tensor-parallel communication": each * (layers * parts.tensor.layer.total + parts.tensor.heads.total),
        "sums of gradients over micro-batches": each
        * sum(gradient_sum_bytes(step.fit.alike(rank).memory) for rank in range(ranks))
        / cluster.rates.memory,
        "transfers between stages": step.transfer * _mean_transfers(config.parallel.schedule, ranks, micro_batches),
    }
    return seconds | {
        "pipeline bubble": step.pipeline - sum(seconds.values()),
        "data-parallel communication": step.data,
        "optimizer": step.update,
    }


def _without_recomputation(config: Config) -> Config:
    loss_mode = "eager" if config.heads.loss_mode == "recompute" else config.heads.loss_mode
    return config.model_copy(
        update={
            "train": config.train.model_copy(update={"activation_checkpointing": "none"}),
            "heads": config.heads.model_copy(update={"loss_mode": loss_mode}),
        }
    )


@cache
def _mean_transfers(schedule: ScheduleName, ranks: int, micro_batches: int) -> float:
    """Return the transfers that a rank waits for, as the mean over the ranks."""
    transfers = 0
    for rank in range(ranks):
        pending = False
        for instruction in instructions(schedule, rank, ranks, micro_batches):
            if instruction.kind == "commit":
                transfers += pending
                pending = False
            elif instruction.kind not in ("forward", "backward"):
                pending = True
    return transfers / ranks
