"""Saving: every rank writes its share of the whole tensors, each of them once."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mtp_dist.checkpoint.files import MODEL, OPTIMIZER, Description, checkpoint_path, sync, tensor_file, write_index
from mtp_dist.config import Config, ConfigError
from mtp_dist.model.weights import parameter_shapes
from mtp_dist.parallel.engine import TrainingEngine
from mtp_dist.parallel.optimizer_state import MOMENTS, ensure_state, moment, updates
from mtp_dist.parallel.topology import Topology
from mtp_dist.parallel.weights import master_weight, owned_weights, whole_tensors

Tensors = dict[str, Tensor]


def save_checkpoint(config: Config, vocab_size: int, engine: TrainingEngine, step: int, samples: Any = None) -> None:
    """Write weights, moments, configuration and the samples' state after update `step`; every rank calls it.

    samples counts on rank 0 only. Nothing half-written has the final name. Raises ConfigError, on every rank, where one
    of them could not write.
    """
    topology = engine.topology
    final = checkpoint_path(config, step)
    unfinished = final.with_name(f"{final.name}.unfinished")
    _together(topology, unfinished, lambda: _make_empty(unfinished) if topology.rank == 0 else None)
    shares = _share_of_this_rank(engine, parameter_shapes(config, vocab_size))
    _together(topology, unfinished, lambda: _write(unfinished, shares, topology))
    description = Description(step, vocab_size, updates(engine.pipeline), config, samples)
    _together(topology, unfinished, lambda: _finish(unfinished, final, description) if topology.rank == 0 else None)


def _together(topology: Topology, folder: Path, write: Callable[[], None]) -> None:
    """Write, then wait for all ranks. Where one fails all raise: else they would wait for it for ever."""
    wrong = None
    try:
        write()
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        wrong = f"cannot write into checkpoint.directory: {getattr(error, 'filename', None) or folder}: {why}"
    failed = torch.tensor(float(wrong is not None), device=topology.device)
    dist.all_reduce(failed)
    if failed:
        raise ConfigError(wrong or f"another rank could not write into checkpoint.directory: {folder}")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _share_of_this_rank(engine: TrainingEngine, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensors]:
    """By kind of file. The ranks of a stage divide its tensors among them; all of them take part in gathering each."""
    stage, topology = engine.stage, engine.topology
    ensure_state(engine.pipeline)
    owned = owned_weights(stage, shapes, topology)
    weights = {n: w.contiguous() for n, w in whole_tensors(stage, shapes, topology, master_weight) if n in owned}
    moments: Tensors = {}
    for key in MOMENTS:
        gathered = whole_tensors(stage, shapes, topology, partial(moment, engine.pipeline, key))
        moments |= {f"{key}.{name}": tensor.contiguous() for name, tensor in gathered if name in owned}
    return {MODEL: weights, OPTIMIZER: moments}


def _write(folder: Path, shares: dict[str, Tensors], topology: Topology) -> None:
    if not folder.is_dir():
        raise OSError(None, f"rank 0 made this folder, rank {topology.rank} does not see it: it must be shared", folder)
    for kind, tensors in shares.items():
        if tensors:
            path = folder / tensor_file(kind, topology.rank, topology.world_size)
            save_file(tensors, path)
            sync(path)


def _finish(unfinished: Path, final: Path, description: Description) -> None:
    shapes = parameter_shapes(description.config, description.vocab_size)
    assert write_index(unfinished, MODEL) == shapes.keys(), "every weight is saved"
    assert write_index(unfinished, OPTIMIZER) == {f"{key}.{name}" for key in MOMENTS for name in shapes}
    description.write(unfinished)
    sync(unfinished)
    replaced = final.with_name(f"{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # renamed before it is deleted: half of it must not have the name of a whole one
        final.rename(replaced)
    unfinished.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    sync(final.parent)
