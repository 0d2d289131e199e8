"""Small complete checkpoints without a training, and ways to damage them."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mtp_dist.checkpoint.format import CheckpointMetadata, SavedLayout
from mtp_dist.checkpoint.manifest import record_of
from mtp_dist.checkpoint.save import write_metadata, write_tensor_files
from mtp_dist.checkpoint.writer import create_staging_dir, publish
from mtp_dist.config import Config
from mtp_dist.distributed.topology import Topology
from mtp_dist.engine.optimizer_state import MOMENTS
from mtp_dist.model.parameters import parameter_shapes
from tests.tiny import tiny_config


def config_in(directory: Path, resume: str = "auto", allow_changes: Sequence[str] = (), **sections: Any) -> Config:
    checkpoint = {"directory": str(directory), "resume": resume, "allow_changes": [*allow_changes]}
    return tiny_config(checkpoint=checkpoint, **sections)


def write_unfinished(config: Config, step: int) -> Path:
    """Write all files of a checkpoint of two ranks into its staging directory."""
    staging = config.checkpoint_dir / f"step_{step:08d}.unfinished"
    create_staging_dir(staging)
    shapes = parameter_shapes(config)
    records = {}
    for rank in range(2):
        topology = Topology(2, 1, 1, rank, 0, 0, torch.device("cpu"))
        weights = {name: torch.full(shape, step + 0.5) for name, shape in list(shapes.items())[rank::2]}
        moments = {f"{key}.{name}": weight.clone() for key in MOMENTS for name, weight in weights.items()}
        records |= write_tensor_files(staging, {"model": weights, "optimizer": moments}, topology)
    layout = SavedLayout(tensor=2, pipeline=1, data=1, world_size=2, zero_stage=0)
    write_metadata(staging, CheckpointMetadata(step, step, config, losses=(3.5, None), layout=layout), records)
    return staging


def write_checkpoint(directory: Path, step: int) -> Path:
    final = directory / f"step_{step:08d}"
    publish(write_unfinished(config_in(directory), step), final)
    return final


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file, and its record in the manifest next to it, if there is one."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    manifest = path.with_name("manifest.json")
    if path != manifest and manifest.exists():
        edit_json(manifest, lambda values: values["files"].update({path.name: asdict(record_of(path))}))


def flip(path: Path, position: int) -> None:
    """Change one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to
