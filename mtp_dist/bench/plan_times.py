"""Predicted and measured processor time of the stages of small pipelines."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mtp_dist.config import Config
from mtp_dist.planner.partition import pipeline_stages
from mtp_dist.planner.parts import Parts, Passes
from mtp_dist.planner.stage_cost import part_flops

if TYPE_CHECKING:
    from mtp_dist.distributed.topology import Topology
    from mtp_dist.engine.hooks import RunInstruction

Row = dict[str, Any]
STEPS = 16
"""Measured training steps of each configuration, after one per rank to warm up."""


def measure_times(name: str, config: Config, topology: Topology) -> list[Row]:
    """Return a row per stage: predicted and measured seconds of processor time per micro-batch.

    Cores that share caches or arithmetic units slow each other down. With one micro-batch per step only one stage
    computes at a time, and the ranks take turns to measure the parts of the model, before each step, so that what slows
    the machine down slows down both. A collective over all ranks.
    """
    import torch.distributed as dist
    from deepspeed.runtime.pipe import schedule

    from mtp_dist.distributed.collectives import all_gather_floats
    from mtp_dist.engine.engine import build_engine
    from mtp_dist.engine.hooks import hook_instruction
    from mtp_dist.engine.measured_partition import PartPasses, median_parts
    from mtp_dist.engine.optimizer import learning_rate
    from mtp_dist.loss.schedule import head_schedule
    from mtp_dist.verify.reference_training import local_batch, random_batch

    parts = PartPasses(config, topology, clock=time.thread_time)
    engine = build_engine(config, topology)
    batch = local_batch(config, topology, *random_batch(config))
    passes: tuple[list[float], list[float]] = ([], [])
    for instruction, seconds in zip((schedule.ForwardPass, schedule.BackwardPass), passes, strict=True):
        hook_instruction(engine.pipeline, instruction, partial(_time, seconds))
    rounds = []
    for step in range(1, STEPS + topology.pp_size + 1):
        if step % topology.pp_size == topology.pp_rank:
            rounds.append(parts.measure())
        dist.barrier()
        engine.train_step(batch, step, learning_rate(config, step), head_schedule(config, step))
    measured = [statistics.median(seconds[topology.pp_size :]) for seconds in passes]
    stages = [Passes(*stage) for stage in all_gather_floats(measured, topology)]
    return time_rows(name, config, median_parts(rounds[1:], config, topology), stages)


def _time(seconds: list[float], execute: RunInstruction) -> None:
    """Add the processor time of this thread: others send and receive, or belong to other programs."""
    started = time.thread_time()
    execute()
    seconds.append(time.thread_time() - started)


def time_rows(name: str, config: Config, parts: Parts, measured: Sequence[Passes]) -> list[Row]:
    """Return what is predicted next to what was measured, on each stage of 1F1B.

    parts: measured seconds of the model's parts.
    """
    stages, flops = pipeline_stages(config), part_flops(config)
    by_flops = flops.scaled(parts.layer.total / flops.layer.total).stages(stages)
    return [
        {
            "case": name,
            "stage": index,
            "trunk_layers": stage.layers,
            "heads": stage.heads,
            "predicted": list(predicted),
            "measured": list(passes),
            "error": predicted.total / passes.total - 1,
            "error_by_flops": by_flops[index].total / passes.total - 1,
        }
        for index, (stage, predicted, passes) in enumerate(zip(stages, parts.stages(stages), measured, strict=True))
    ]
