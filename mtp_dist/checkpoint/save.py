"""Writing a rank's files of a checkpoint: each full tensor is written by one rank, the metadata by rank 0."""

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
from mtp_dist.model.parameters import is_trained, parameter_shapes

Tensors = dict[str, Tensor]
Shards = dict[str, TensorShard]


@dataclass(frozen=True)
class Snapshot:
    """A copy in host memory of what is to be saved, so that training can continue."""

    metadata: CheckpointMetadata
    """Metadata, of which the state of the samples is valid on rank 0 only."""
    shards: dict[str, Shards]
    """This rank's shards by global name, for each kind of file."""


def take_snapshot(config: Config, engine: TrainingEngine, state: RunState) -> Snapshot:
    """Copy the state after step `state.step`. A collective over all ranks."""
    topology = engine.topology
    ensure_state(engine.pipeline)
    check_updates(engine.pipeline, engine.optimizer_updates)
    metadata = CheckpointMetadata(
        step=state.step,
        optimizer_updates=engine.optimizer_updates,
        config=config,
        samples=state.samples,
        losses=[loss if loss is not None and isfinite(loss) else None for loss in state.losses],
        recent_losses=state.recent_losses,
        layout=SavedLayout(
            **topology.degrees,
            world_size=topology.world_size,
            zero_stage=engine.pipeline.zero_optimization_stage(),
        ),
    )
    return Snapshot(metadata, _local_shards(engine, parameter_shapes(config)))


def _local_shards(engine: TrainingEngine, shapes: dict[str, tuple[int, ...]]) -> dict[str, Shards]:
    stage, topology = engine.stage, engine.topology
    shards: dict[str, Shards] = {MODEL: local_shards(stage, shapes, topology, master_weight), OPTIMIZER: {}}
    for key in MOMENTS:
        moments = local_shards(stage, shapes, topology, partial(moment, engine.pipeline, key))
        shards[OPTIMIZER] |= {f"{key}.{name}": shard for name, shard in moments.items()}
    return shards


def gather_owned_tensors(snapshot: Snapshot, topology: Topology, tp_group: dist.ProcessGroup) -> dict[str, Tensors]:
    """Gather the full tensors that this rank writes, for each kind of file, out of the snapshot's shards.

    A collective over `tp_group`, a tensor-parallel group for the CPU.
    """
    return {kind: gather_full_tensors(shards, topology, tp_group) for kind, shards in snapshot.shards.items()}


@dataclass(frozen=True)
class TensorFile:
    """A file that a rank has written."""

    kind: str
    record: FileRecord
    shapes: dict[str, tuple[int, ...]]
    """Shapes of its tensors by name."""


def write_tensor_files(folder: Path, tensors: Mapping[str, Tensors], topology: Topology) -> dict[str, TensorFile]:
    """Write this rank's files, read them back and return them by name. Raise OSError if that fails."""
    if not folder.is_dir():
        raise OSError(
            None, f"rank 0 created this folder, rank {topology.rank} cannot find it: it must be shared", folder
        )
    written = {}
    for kind, kind_tensors in tensors.items():
        if kind_tensors:
            name = tensor_file(kind, topology.rank, topology.world_size)
            shapes = {tensor: tuple(values.shape) for tensor, values in kind_tensors.items()}
            written[name] = TensorFile(kind, _write_tensors(folder / name, kind_tensors), shapes)
    sync(folder)
    return written


def _write_tensors(path: Path, tensors: Tensors) -> FileRecord:
    try:
        save_file(tensors, path)
        sync(path)
        _drop_page_cache(path)
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                # Compared as integers: NaN equals itself.
                if not torch.equal(file.get_tensor(name).view(torch.int32), tensor.view(torch.int32)):
                    raise OSError(None, f"{name} does not read back as it was written")
        return record_of(path)
    except (OSError, SafetensorError) as error:
        # Not all of them name the file, and some a temporary one.
        raise OSError(None, getattr(error, "strerror", None) or str(error), path) from None


def _drop_page_cache(path: Path) -> None:
    """Have the next read come from the disk, not from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def write_metadata(folder: Path, metadata: CheckpointMetadata, tensor_files: Mapping[str, TensorFile]) -> None:
    """Write the indexes, the metadata and the manifest on rank 0, after all ranks' files. Raise OSError if that fails.

    tensor_files: those of all ranks, by name.
    """
    shapes = parameter_shapes(metadata.config)
    trained = [name for name in shapes if is_trained(metadata.config, name)]
    expected = {MODEL: set(shapes), OPTIMIZER: {f"{key}.{name}" for key in MOMENTS for name in trained}}
    for kind, names in expected.items():
        file_shapes = {name: file.shapes for name, file in sorted(tensor_files.items()) if file.kind == kind}
        if differing := write_index(folder, kind, file_shapes) ^ names:
            raise RuntimeError(f"the ranks wrote other tensors than the model has: {sorted(differing)[:3]}")
    metadata.write(folder)
    records = {name: file.record for name, file in tensor_files.items()}
    json_files = (METADATA_FILE, *map(index_file, expected))
    write_manifest(folder, records | {name: record_of(folder / name) for name in json_files})
    sync(folder)
