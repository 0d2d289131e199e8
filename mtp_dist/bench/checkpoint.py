"""Seconds of saving and loading a checkpoint, and of training's wait for it, compared with `torch.save`."""

from __future__ import annotations

import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtp_dist.bench.measure import paired_seconds
from mtp_dist.checkpoint.format import RunState, checkpoint_path
from mtp_dist.checkpoint.restore import restore
from mtp_dist.checkpoint.save import gather_owned_tensors, take_snapshot
from mtp_dist.checkpoint.saver import CheckpointSaver
from mtp_dist.config import Config
from mtp_dist.distributed.device import device_name
from mtp_dist.distributed.topology import GlooGroups, Topology, new_gloo_groups
from mtp_dist.engine.engine import TrainingEngine, build_engine
from mtp_dist.engine.optimizer import learning_rate
from mtp_dist.loss.schedule import head_schedule
from mtp_dist.provenance import processor_name, usable_cores
from mtp_dist.verify.reference_training import local_batch, random_batch

STEP = 1


@dataclass
class _Subject:
    """A model after one update, and the two ways to save it."""

    config: Config
    engine: TrainingEngine
    groups: GlooGroups
    saver: CheckpointSaver
    plain_file: Path
    """File of this rank that torch.save writes."""

    def save(self) -> None:
        self.saver.save(RunState(STEP))

    def save_and_wait(self) -> None:
        self.save()
        self.saver.wait()

    def save_plainly(self) -> None:
        """Write and sync this rank's part of the checkpoint by torch.save, gathered in the same way."""
        snapshot = take_snapshot(self.config, self.engine, RunState(STEP))
        tensors = gather_owned_tensors(snapshot, self.engine.topology, self.groups.tensor)
        with self.plain_file.open("wb") as stream:
            torch.save(tensors, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def load(self) -> None:
        restore(self.engine, checkpoint_path(self.config, STEP))

    def load_plainly(self) -> None:
        torch.load(self.plain_file, weights_only=True)


def measure_checkpoints(config: Config, topology: Topology, folder: Path, rounds: int) -> dict[str, Any]:
    """Return the medians over the rounds, on every rank. Raise UserError if `folder`, on the disk to measure, cannot be
    written; it is deleted at the end.
    """
    to_folder = config.checkpoint.model_copy(update={"directory": str(folder)})
    config = config.model_copy(update={"checkpoint": to_folder})
    engine = build_engine(config, topology)
    batch = local_batch(config, topology, *random_batch(config))
    engine.train_step(batch, STEP, learning_rate(config, STEP), head_schedule(config, STEP))
    groups = new_gloo_groups(topology)
    saver = CheckpointSaver(config, engine, groups)
    subject = _Subject(config, engine, groups, saver, folder / f"torch-{topology.rank}.pt")
    # Once to warm up; it also makes the folder.
    for way in (subject.save_and_wait, subject.save_plainly, subject.load, subject.load_plainly):
        way()
    seconds = paired_seconds(
        {
            "stall": subject.save,
            "save": subject.save_and_wait,
            "torch.save": subject.save_plainly,
        },
        rounds,
        topology.device,
        lambda _: saver.wait(),
    )
    seconds |= paired_seconds({"load": subject.load, "torch.load": subject.load_plainly}, rounds, topology.device)
    saved = sum(path.stat().st_size for path in checkpoint_path(config, STEP).glob("*.safetensors"))
    dist.barrier()
    if topology.rank == 0:
        shutil.rmtree(folder)
    pairs = zip(seconds["stall"], seconds["save"], strict=True)
    return {
        "machine": {"processor": processor_name(), "cores": usable_cores(), "device": device_name(topology.device)},
        "layout": topology.degrees,
        "megabytes": saved / 1e6,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "stall_share": statistics.median(stall / whole for stall, whole in pairs),
        "seconds_by_round": seconds,
    }
