"""Seconds of training steps with uniform and with balanced stages, compared with the planner's prediction."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from torch import nn

from mtp_dist.bench.measure import paired_seconds
from mtp_dist.config import Config
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.engine import TrainingEngine, build_engine
from mtp_dist.engine.heads_with_loss import HeadsWithLoss
from mtp_dist.engine.measured_partition import measure_parts
from mtp_dist.engine.optimizer import learning_rate
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.model.trunk import TrunkLayer
from mtp_dist.planner.balance import Arrangement, arrangements
from mtp_dist.planner.layouts import replace_values
from mtp_dist.planner.parts import Parts, Passes
from mtp_dist.planner.schedule import simulate
from mtp_dist.planner.stage_cost import part_flops
from mtp_dist.provenance import processor_name, usable_cores
from mtp_dist.verify.reference_training import local_batch, random_batch

STEP = 1
NAMES = ("uniform", "balanced")


def measure_balance(config: Config, topology: Topology, rounds: int, sleep_ms: float | None) -> dict[str, Any]:
    """Return the medians over the rounds, on every rank.

    sleep_ms: let a trunk layer also sleep so long per forward pass, and its backward pass and the heads in proportion
    to their FLOPs: a tiny model then has the times of a large one, on more ranks than there are cores.
    """
    flops = part_flops(config)
    sleep = None if sleep_ms is None else flops.scaled(sleep_ms / 1000 / flops.layer.forward)
    parts = sleep or measure_parts(config, topology)
    found = arrangements(flops, config.model.trunk_layers, topology.pp_size)
    engines = {name: _build(config, topology, found[name], sleep) for name in NAMES}
    batch = local_batch(config, topology, *random_batch(config))

    def train(name: str) -> None:
        engines[name].train_step(batch, STEP, learning_rate(config, STEP), head_schedule(config, STEP))

    steps = {name: partial(train, name) for name in NAMES}
    for step in steps.values():  # to warm up
        step()
    seconds = paired_seconds(steps, rounds, topology.device)
    predicted = {name: _step_seconds(found[name], parts, config) for name in NAMES}
    by_flops = {name: _step_seconds(found[name], flops, config) for name in NAMES}
    return {
        "machine": {"processor": processor_name(), "cores": usable_cores(), "device": device_name(topology.device)},
        "layout": topology.degrees,
        "micro_batches": config.micro_batches,
        "sleep_milliseconds": sleep_ms,
        "rows": [
            {
                "partition": name,
                "trunk_layers": [stage.layers for stage in found[name].stages],
                "seconds": statistics.median(seconds[name]),
                "predicted_seconds": predicted[name],
            }
            for name in NAMES
        ],
        "speedup": statistics.median(slow / fast for slow, fast in zip(*seconds.values(), strict=True)),
        "predicted_speedup": {
            "by FLOPs": by_flops["uniform"] / by_flops["balanced"],
            "by times": predicted["uniform"] / predicted["balanced"],
        },
        "seconds_by_round": seconds,
    }


def _step_seconds(arrangement: Arrangement, parts: Parts, config: Config) -> float:
    return simulate(arrangement.schedule, arrangement.passes(parts), config.micro_batches).seconds


def _build(config: Config, topology: Topology, arrangement: Arrangement, sleep: Parts | None) -> TrainingEngine:
    """Build the engine of an arrangement whose layers and heads sleep for the given seconds, if any."""
    partition = tuple(stage.layers for stage in arrangement.stages)
    engine = build_engine(replace_values(config, {"parallel.partition": partition}), topology)
    if sleep:
        for layer in engine.stage.modules():
            if isinstance(layer, TrunkLayer):
                _sleep_in(layer, sleep.layer)
            elif isinstance(layer, HeadsWithLoss):
                _sleep_in(layer, sleep.heads)
    return engine


def _sleep_in(layer: nn.Module, passes: Passes) -> None:
    layer.register_forward_hook(lambda *_: time.sleep(passes.forward))
    layer.register_full_backward_hook(lambda *_: time.sleep(passes.backward))
