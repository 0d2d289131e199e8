"""What a rank writes of a checkpoint: its share of the whole tensors, each tensor once, and on rank 0 the rest."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtp_dist.checkpoint.format import (
    METADATA_FILE,
    MODEL,
    OPTIMIZER,
    CheckpointMetadata,
    RunState,
    SavedLayout,
    index_file,
    tensor_file,
)
from mtp_dist.checkpoint.manifest import FileRecord, record_of, write_manifest
from mtp_dist.checkpoint.writer import write_index
from mtp_dist.config import Config
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.engine.optimizer_state import MOMENTS, check_updates, ensure_state, moment
from mtp_dist.engine.tensor_shards import TensorShard, gather_full_tensors, local_shards, master_weight
from mtp_dist.fs import sync
from mtp_dist.model.parameters import parameter_shapes

Tensors = dict[str, Tensor]
Parts = dict[str, TensorShard]


@dataclass(frozen=True)
class Snapshot:
    """What is to be saved, in host memory of its own: training may go on."""

    description: CheckpointMetadata
    """What it says of the samples counts on rank 0 only."""
    parts: dict[str, Parts]
    """This rank's contribution, by kind of file."""


def take_snapshot(config: Config, engine: TrainingEngine, state: RunState) -> Snapshot:
    """Of the state after update `state.step`. A collective over all ranks."""
    topology = engine.topology
    layout = SavedLayout(
        tensor=topology.tp_size,
        pipeline=topology.pp_size,
        data=topology.dp_size,
        world_size=topology.world_size,
        zero_stage=engine.pipeline.zero_optimization_stage(),
    )
    ensure_state(engine.pipeline)
    check_updates(engine.pipeline, engine.optimizer_updates)
    parts = _parts_of_this_rank(engine, parameter_shapes(config))
    description = CheckpointMetadata(
        step=state.step,
        optimizer_updates=engine.optimizer_updates,
        config=config,
        samples=state.samples,
        losses=[loss if loss is not None and isfinite(loss) else None for loss in state.losses],
        recent_losses=state.recent_losses,
        layout=layout,
    )
    return Snapshot(description, parts)


def _parts_of_this_rank(engine: TrainingEngine, shapes: dict[str, tuple[int, ...]]) -> dict[str, Parts]:
    """By kind of file."""
    stage, topology = engine.stage, engine.topology
    parts: dict[str, Parts] = {MODEL: local_shards(stage, shapes, topology, master_weight), OPTIMIZER: {}}
    for key in MOMENTS:
        of_moment = local_shards(stage, shapes, topology, partial(moment, engine.pipeline, key))
        parts[OPTIMIZER] |= {f"{key}.{name}": part for name, part in of_moment.items()}
    return parts


def gather_owned_tensors(snapshot: Snapshot, topology: Topology, tp_group: dist.ProcessGroup) -> dict[str, Tensors]:
    """The whole tensors that this rank writes, by kind of file; the snapshot's parts become these.

    A collective over `tp_group`, a tensor-parallel group for the CPU.
    """
    return {kind: gather_full_tensors(parts, topology, tp_group) for kind, parts in snapshot.parts.items()}


@dataclass(frozen=True)
class TensorFile:
    """What a rank reports of a file that it wrote."""

    kind: str
    record: FileRecord
    shapes: dict[str, tuple[int, ...]]
    """Of the tensors in it, by name."""


def write_tensor_files(folder: Path, tensors: Mapping[str, Tensors], topology: Topology) -> dict[str, TensorFile]:
    """Write this rank's files, read them back and return what they are, by name. Raise OSError if that fails."""
    if not folder.is_dir():
        raise OSError(None, f"rank 0 made this folder, rank {topology.rank} does not see it: it must be shared", folder)
    written = {}
    for kind, of_kind in tensors.items():
        if of_kind:
            name = tensor_file(kind, topology.rank, topology.world_size)
            shapes = {tensor: tuple(values.shape) for tensor, values in of_kind.items()}
            written[name] = TensorFile(kind, _write_tensors(folder / name, of_kind), shapes)
    sync(folder)
    return written


def _write_tensors(path: Path, tensors: Tensors) -> FileRecord:
    try:
        save_file(tensors, path)
        sync(path)
        _forget_cached(path)
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                # As integers: NaN equals itself.
                if not torch.equal(file.get_tensor(name).view(torch.int32), tensor.view(torch.int32)):
                    raise OSError(None, f"{name} reads back as something else than was written")
        return record_of(path)
    except (OSError, SafetensorError) as error:
        # Not all of them name the file, and some a temporary one.
        raise OSError(None, getattr(error, "strerror", None) or str(error), path) from None


def _forget_cached(path: Path) -> None:
    """What is read next comes from the disk, not from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def write_metadata(folder: Path, description: CheckpointMetadata, tensor_files: Mapping[str, TensorFile]) -> None:
    """Write what rank 0 writes when the files of all ranks are there. Raise OSError if that fails.

    tensor_files: those of all ranks, by name.
    """
    shapes = parameter_shapes(description.config)
    expected = {MODEL: set(shapes), OPTIMIZER: {f"{key}.{name}" for key in MOMENTS for name in shapes}}
    for kind, names in expected.items():
        of_kind = {name: file.shapes for name, file in sorted(tensor_files.items()) if file.kind == kind}
        if differing := write_index(folder, kind, of_kind) ^ names:
            raise RuntimeError(f"the ranks wrote other tensors than the model has: {sorted(differing)[:3]}")
    description.write(folder)
    records = {name: file.record for name, file in tensor_files.items()}
    small = (METADATA_FILE, *map(index_file, expected))
    write_manifest(folder, records | {name: record_of(folder / name) for name in small})
    sync(folder)
