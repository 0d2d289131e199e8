"""Time of a training step, and what it goes into."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from mtp_dist.config import Config
from mtp_dist.config.schema import ParallelConfig
from mtp_dist.planner.fit import Fit
from mtp_dist.planner.flops import model_flops_per_token
from mtp_dist.planner.layouts import replace_values
from mtp_dist.planner.parts import Passes
from mtp_dist.planner.schedule import ScheduleName, Timeline, instructions, schedule_name, simulate
from mtp_dist.planner.stage_cost import stage_cost
from mtp_dist.planner.stage_times import Cluster, axis_rates, flop_seconds, stage_seconds, update_bytes


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
    def rank_work(self) -> list[float]:
        """Seconds of each pipeline rank per micro-batch."""
        return _rank_sums([each.total for each in self.passes], self.fit.config.parallel)

    @property
    def balance(self) -> float:
        """Mean work of the pipeline ranks relative to that of the rank with the most: the largest fraction of time in
        which they can work.
        """
        return sum(self.rank_work) / (len(self.rank_work) * max(self.rank_work))


def estimate(fit: Fit, cluster: Cluster, simulated: bool = True) -> StepEstimate:
    """Return the time of a step.

    simulated: False replaces the timeline of the micro-batches by a formula, for the comparison of many layouts: the
    first micro-batch passes all stages, then the slowest rank never waits. For 1F1B it is a lower bound.
    """
    config, rates = fit.config, axis_rates(fit.config, cluster)
    passes = tuple(seconds.passes for seconds in stage_seconds(fit, cluster))
    transfer = max(cost.next_stage_bytes for cost in fit.costs) / rates.pipeline
    if simulated:
        pipeline = _simulated_seconds(config, passes, transfer)
    else:
        slowest = max(_rank_sums([each.total for each in passes], config.parallel))
        pipeline = sum(each.total for each in passes) + (config.micro_batches - 1) * slowest
    return StepEstimate(
        fit,
        cluster,
        passes,
        transfer,
        pipeline,
        data=max(_rank_sums([cost.data_bytes for cost in fit.costs], config.parallel)) / rates.data,
        update=max(update_bytes(rank.memory) for rank in fit.distinct_ranks.values()) / cluster.rates.memory,
    )


def timeline(step: StepEstimate, micro_batches: int) -> Timeline:
    """Return the timeline of a step with another number of micro-batches."""
    return simulate(schedule_name(step.fit.config), step.passes, micro_batches, step.transfer)


def _simulated_seconds(config: Config, passes: Sequence[Passes], transfer: float) -> float:
    """Return the time of all micro-batches. From some number on, each further one takes equally long."""
    schedule, ranks, micro_batches = schedule_name(config), config.parallel.pipeline, config.micro_batches
    if ranks == 1:
        return micro_batches * passes[0].total
    fewer, simulated = 3 * ranks, 4 * ranks
    if micro_batches <= simulated:
        return simulate(schedule, passes, micro_batches, transfer).seconds
    before, seconds = (simulate(schedule, passes, count, transfer).seconds for count in (fewer, simulated))
    return seconds + (micro_batches - simulated) * (seconds - before) / (simulated - fewer)


def _rank_sums(by_stage: Sequence[float], parallel: ParallelConfig) -> list[float]:
    """Return the sum over the stages of each pipeline rank."""
    return [sum(by_stage[stage] for stage in parallel.rank_stages(rank)) for rank in range(parallel.pipeline)]


def time_by_part(step: StepEstimate) -> dict[str, float]:
    """Return what a step's seconds go into, as the mean over the ranks of the pipeline."""
    fit, config = step.fit, step.fit.config
    ranks, micro_batches = config.parallel.pipeline, config.micro_batches
    stages, once = stage_seconds(fit, step.cluster), _without_recomputation(fit)
    compute = sum(stage.compute.total for stage in stages)
    needed = sum(stage.compute.total for stage in stage_seconds(once, step.cluster))
    with_heads = ((stage, parts.heads) for stage, parts in enumerate(fit.stages) if parts.heads)
    costs = [stage_cost(once.config, stage, 0, heads) for stage, heads in with_heads]
    heads = flop_seconds(step.cluster) * sum(cost.forward_flops + cost.backward_flops for cost in costs)
    per_rank = micro_batches / ranks
    seconds = {
        "trunk layers": per_rank * (needed - heads),
        "heads and their loss": per_rank * heads,
        "recomputation": per_rank * (compute - needed),
        "tensor-parallel communication": per_rank * sum(stage.tensor.total for stage in stages),
        "sums of gradients over micro-batches": per_rank * sum(stage.sums for stage in stages),
        "transfers between stages": step.transfer * _mean_transfers(schedule_name(config), ranks, micro_batches),
    }
    return seconds | {
        "pipeline bubble": step.pipeline - sum(seconds.values()),
        "data-parallel communication": step.data,
        "optimizer": step.update,
    }


def _without_recomputation(fit: Fit) -> Fit:
    loss_mode = "eager" if fit.config.heads.loss_mode == "recompute" else fit.config.heads.loss_mode
    changes = {"train.activation_checkpointing": "none", "heads.loss_mode": loss_mode}
    return replace(fit, config=replace_values(fit.config, changes))


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
