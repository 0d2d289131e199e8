"""The model's weights on disk: whole tensors by global name, so any layout's checkpoint opens anywhere.

A checkpoint is a folder `step_00000010` with `config.json` and one safetensors file a pipeline stage, tied together
by `model.safetensors.index.json` as Hugging Face does it.
"""

import json
import math
import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtp_dist.config import Config, ConfigError, build_config
from mtp_dist.model.weights import parameter_shapes
from mtp_dist.parallel.pipeline import MultiTokenPipeline
from mtp_dist.parallel.topology import Topology
from mtp_dist.parallel.weights import master_weight, whole_tensors

INDEX = "model.safetensors.index.json"


def checkpoint_path(config: Config, step: int) -> Path:
    return config.checkpoint_dir / f"step_{step:08d}"


def save_weights(config: Config, vocab_size: int, stage: MultiTokenPipeline, topology: Topology, step: int) -> None:
    """Write the fp32 weights of all stages; every rank calls it. Nothing half-written has the final name."""
    final = checkpoint_path(config, step)
    unfinished = final.with_name(f"{final.name}.unfinished")
    if topology.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    shapes = parameter_shapes(config, vocab_size)
    writes = topology.tensor_rank == 0 and topology.data_rank == 0
    tensors = {}
    for name, tensor in whole_tensors(stage, shapes, topology, master_weight):
        if writes:  # the other ranks of the stage only take part in gathering it
            tensors[name] = tensor.contiguous()
    if writes:
        if not unfinished.is_dir():
            raise ConfigError(
                f"checkpoint.directory = '{final.parent}' is not shared: rank 0 made a folder there that "
                f"rank {topology.rank} does not see"
            )
        save_file(tensors, unfinished / _stage_file(topology.pipeline_rank, topology.pipeline))
    dist.barrier()
    if topology.rank == 0:
        _write_index(unfinished, shapes)
        description = {"step": step, "vocab_size": vocab_size, "config": config.model_dump(mode="json")}
        (unfinished / "config.json").write_text(json.dumps(description, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    dist.barrier()


def _stage_file(stage: int, stages: int) -> str:
    return f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"


def _write_index(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            files.update(dict.fromkeys(file.keys(), path.name))
    assert files.keys() == shapes.keys(), "every weight is saved exactly once"
    size = sum(4 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": {name: files[name] for name in shapes}}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def load_weights(folder: Path) -> tuple[Config, int, dict[str, Tensor]]:
    """Configuration, vocabulary size and whole fp32 weights by global name. Raises ConfigError where there are none."""
    try:
        description = json.loads((folder / "config.json").read_text())
        config, vocab_size = build_config(description["config"]), int(description["vocab_size"])
        weights = {}
        for file_name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values())):
            with safe_open(folder / file_name, "pt") as file:
                weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, not a dict
    except OSError as error:
        raise ConfigError(f"{folder} is not a whole checkpoint: {error.filename or error} cannot be read") from None
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} is not a checkpoint of ours, or a damaged one: {error}") from None
    return config, vocab_size, weights
