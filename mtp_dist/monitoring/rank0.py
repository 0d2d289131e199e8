"""Callbacks that run on rank 0 only: metrics writers, events and stragglers, and the description of the run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mtp_dist.config import Config
from mtp_dist.data.datasets import ValidationSet
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.topology import Topology
from mtp_dist.fs import atomic_write_text
from mtp_dist.monitoring.callback import Callback
from mtp_dist.monitoring.events import EVENTS, EventRecorder
from mtp_dist.monitoring.logs import PACKAGE_LOGGER
from mtp_dist.monitoring.metrics_logger import MetricsLogger
from mtp_dist.monitoring.scalars import ThroughputUnits
from mtp_dist.monitoring.stragglers import Stragglers
from mtp_dist.monitoring.writers.jsonl import JsonlWriter
from mtp_dist.monitoring.writers.progress import ProgressBar
from mtp_dist.monitoring.writers.tensorboard import TensorBoardWriter
from mtp_dist.monitoring.writers.wandb import WandbWriter
from mtp_dist.monitoring.writers.writer import MetricsWriter
from mtp_dist.planner.devices import peak_flops
from mtp_dist.planner.flops import model_flops_per_token, parameter_counts
from mtp_dist.provenance import provenance
from mtp_dist.versions import installed_versions

RUN = "run.json"


def rank0_callbacks(
    config: Config,
    topology: Topology,
    validation_sets: Sequence[ValidationSet],
    hosts: Sequence[str],
    completed_steps: int,
) -> list[Callback]:
    """Describe the run in `run.json`, record its events from now on and return the callbacks of rank 0.

    hosts: host name of each rank. completed_steps: 0, or the step of the checkpoint that the run resumes from.
    """
    folder = config.output_dir
    writers: list[MetricsWriter] = [
        ProgressBar(config.train.steps),
        JsonlWriter(folder / "metrics.jsonl", completed_steps),
    ]
    if config.log.tensorboard:
        names = [validation_set.name for validation_set in validation_sets]
        writers.append(TensorBoardWriter(folder / "tensorboard", names, completed_steps))
    if config.log.wandb:
        writers.append(WandbWriter(config.log.wandb, config.run.name, folder))
    peak = peak_flops(device_name(topology.device), config.train.precision)
    units = ThroughputUnits(
        flops_per_token=[model_flops_per_token(config, active) for active in range(1, config.heads.count + 1)],
        peak_flops=peak and peak * topology.world_size,
        bytes_per_token={validation_set.name: validation_set.bytes_per_token for validation_set in validation_sets},
    )
    metrics = MetricsLogger(writers, units, _describe_run(config, topology))
    events = EventRecorder(folder / EVENTS, completed_steps, config.train.steps, metrics.note)
    PACKAGE_LOGGER.addHandler(events)
    return [events, metrics, Stragglers(hosts)]


def _describe_run(config: Config, topology: Topology) -> dict[str, Any]:
    """Write `run.json` and return its contents: configuration, layout, parameters, versions and provenance."""
    description = {
        "config": config.model_dump(mode="json"),
        "layout": topology.degrees,
        "device": device_name(topology.device),
        "parameters": asdict(parameter_counts(config)),
        "versions": installed_versions(),
        "measured": provenance(),
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_text(config.output_dir / RUN, json.dumps(description, indent=2) + "\n")
    return description
