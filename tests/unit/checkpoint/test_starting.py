"""Each rank reads only its own shards when a run starts from a checkpoint, and only rank 0 queries the files."""

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_dist.checkpoint.manifest import check_fully, record_of, write_manifest
from tests.integration.jobs import write_config
from tests.ranks import Ranks
from tests.unit.checkpoint.on_ranks import run_program

RANKS, STEPS = 4, 2
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tensor and data": (2, ["parallel.tensor=2"]),
    "ZeRO": (1, ["parallel.zero_stage=1"]),
    "bf16, stages": (1, ["train.precision=bf16", "parallel.pipeline=2", "heads.kind=sequential"]),
}
"""Tensor-parallel ranks and overrides."""


@dataclass
class Seen:
    """What one rank did with the files of a checkpoint."""

    opened: Counter[str] = field(default_factory=Counter)
    """Number of times that each file was opened, by name."""
    queried: int = 0
    """Number of times that the size or kind of a file was queried, or a folder listed."""
    bytes_read: int = 0
    bytes_needed: float = 0
    """Bytes of the weights and moments that this rank must read."""
    drawn: list[str] = field(default_factory=list)
    """Weights that got an initial value."""


def start(config_file: Path, overrides: Sequence[str], folder: Path) -> Seen:
    """Start the program as far as its first step, from the checkpoint in folder."""
    from mtp_dist import run
    from mtp_dist.checkpoint import reader
    from mtp_dist.model import parameters

    seen = Seen()

    def open_file(operation: Callable[..., Any], path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith(str(folder)):
            seen.opened[Path(path).name] += 1
        return operation(path, *arguments, **options)

    def query(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        seen.queried += bool(arguments) and str(arguments[0]).startswith(str(folder))
        return operation(*arguments, **options)

    def read(operation: Callable[..., Tensor], *arguments: Any) -> Tensor:
        values = operation(*arguments)
        seen.bytes_read += values.nbytes
        return values

    def draw(operation: Callable[..., Tensor], config: Any, name: str, shape: Any) -> Tensor:
        seen.drawn.append(name)
        return operation(config, name, shape)

    def restore(operation: Callable[..., None], engine: Any, *arguments: Any) -> None:
        numbers = sum(weight.numel() for _, weight in parameters.named_weights(engine.stage))
        seen.bytes_needed = 12 * numbers / engine.topology.dp_size
        operation(engine, *arguments)

    with pytest.MonkeyPatch.context() as patch:

        def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
            operation = getattr(owner, name)
            patch.setattr(owner, name, lambda *arguments, **options: wrapper(operation, *arguments, **options))

        for module in [module for name, module in sys.modules.items() if name.startswith("mtp_dist.")]:
            if hasattr(module, "initial_weight"):
                wrap(module, "initial_weight", draw)
        for owner, name, wrapper in (
            *((os, name, query) for name in ("stat", "lstat", "listdir", "scandir")),
            (io, "open", open_file),
            (reader, "safe_open", open_file),
            (reader.TensorReader, "read", read),
            (reader.TensorReader, "read_block", read),
            (run, "restore", restore),
        ):
            wrap(owner, name, wrapper)
        patch.setattr(run, "Trainer", Mock(side_effect=KeyboardInterrupt))
        with suppress(KeyboardInterrupt):
            run_program(config_file, *overrides)
    return seen


def with_files(folder: Path, target: Path, files: int) -> Path:
    """Copy a checkpoint into that number of files of either kind, of about the same size."""
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    for kind in ("model", "optimizer"):
        index = json.loads((folder / f"{kind}.safetensors.index.json").read_text())
        tensors: dict[str, Tensor] = {}
        for path in dict.fromkeys(index["weight_map"].values()):
            tensors |= load_file(folder / path)
        ends = [*accumulate(tensor.numel() for tensor in tensors.values())]
        middles = (end - tensor.numel() / 2 for end, tensor in zip(ends, tensors.values(), strict=True))
        names = (f"{kind}-{int(files * middle / ends[-1]) + 1:05d}-of-{files:05d}.safetensors" for middle in middles)
        index["weight_map"] = dict(zip(tensors, names, strict=True))
        for path in set(index["weight_map"].values()):
            save_file({name: tensors[name] for name, its in index["weight_map"].items() if its == path}, target / path)
        (target / f"{kind}.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(target, {path.name: record_of(path) for path in target.iterdir()})
    check_fully(target)
    return target


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_reads_its_own_shards_only(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    config = write_config(tmp_path)
    tensor_parallel, overrides = LAYOUTS[layout]
    overrides = [f"train.steps={STEPS}", "train.validate_every=null", *overrides]
    ranks.run(RANKS, run_program, config, *overrides, f"run.output_dir={tmp_path / 'out'}")
    saved = tmp_path / "out" / "checkpoints" / f"step_{STEPS:08d}"
    seen = {}
    for files in (1, 24):
        folder = with_files(saved, tmp_path / f"in {files}" / saved.name, files)
        resume = [f"checkpoint.resume={folder}", "train.steps=9", "checkpoint.allow_changes=[train.steps]"]
        resume.append(f"run.output_dir={tmp_path / f'out {files}'}")
        seen[files] = ranks.run(RANKS, start, config, [*overrides, *resume], folder)
    # Once to compare a file with the manifest, and once if the rank's tensors lie in it, the neighbours' included.
    most_opens = len(list(folder.glob("*.safetensors"))) / RANKS * (1 + tensor_parallel) + 8
    for by_rank in seen.values():
        for rank in by_rank:
            assert rank.drawn == [], "no weight is drawn that is loaded"
            assert 0 < rank.bytes_read <= 1.1 * rank.bytes_needed
            opened = {name: times for name, times in rank.opened.items() if name.endswith(".safetensors")}
            assert sum(opened.values()) <= most_opens, opened
    for few, many in zip(*(by_rank[1:] for by_rank in seen.values()), strict=True):
        assert few.queried == many.queried, "only the first rank queries sizes of files"
        for name in ("manifest.json", "config.json", "model.safetensors.index.json"):
            assert 0 < few.opened[name] == many.opened[name] <= 4
