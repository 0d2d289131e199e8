"""Each rank reads only its own shards when a run starts from a checkpoint, and only rank 0 queries the files."""

import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

from mtp_dist.checkpoint.manifest import check_fully, record_of, write_manifest
from tests.integration.jobs import write_config
from tests.ranks import Ranks
from tests.unit.checkpoint.on_ranks import run_program

RANKS, STEPS = 4, 2
LAYOUTS = {
    "tensor and data": ["parallel.tensor=2"],
    "ZeRO": ["parallel.zero_stage=1"],
    "bf16, stages": ["train.precision=bf16", "parallel.pipeline=2", "heads.kind=sequential"],
}


class Seen(NamedTuple):
    """What one rank did with the files of a checkpoint."""

    opened: Counter[str]
    """Number of times that each file was opened, by name."""
    queried: int
    """Number of times that the size or kind of a file was queried, or a folder listed."""
    read: float
    """Bytes of tensors that were read, relative to those of this rank's weights and moments."""


def start(config_file: Path, overrides: Sequence[str], folder: Path) -> Seen:
    """Start the program as far as its first step, from the checkpoint in folder."""
    from mtp_dist import run
    from mtp_dist.checkpoint import reader
    from mtp_dist.model import parameters

    bytes_read = 0

    def counted(values: Tensor) -> Tensor:
        nonlocal bytes_read
        bytes_read += values.nbytes
        return values

    def paths(calls: Iterable[Mock]) -> Iterator[Path]:
        """Yield the arguments that are paths in the folder."""
        arguments = (str(call.args[0]) for mock in calls for call in mock.call_args_list if call.args)
        return (Path(argument) for argument in arguments if argument.startswith(str(folder)))

    with pytest.MonkeyPatch.context() as patch:

        def spy(owner: Any, name: str) -> Mock:
            patch.setattr(owner, name, mock := Mock(side_effect=getattr(owner, name)))
            return mock

        queries = [spy(os, name) for name in ("stat", "lstat", "listdir", "scandir")]
        opens, restore = [spy(io, "open"), spy(reader, "safe_open")], spy(run, "restore")
        for name in ("read", "read_block"):
            read = getattr(reader.TensorReader, name)
            patch.setattr(reader.TensorReader, name, lambda *arguments, read=read: counted(read(*arguments)))
        drawn = Mock(side_effect=parameters.initial_weight)
        for module in [module for name, module in sys.modules.items() if name.startswith("mtp_dist.")]:
            if hasattr(module, "initial_weight"):
                patch.setattr(module, "initial_weight", drawn)
        patch.setattr(run, "Trainer", Mock(side_effect=KeyboardInterrupt))
        with suppress(KeyboardInterrupt):
            run_program(config_file, *overrides)
    assert not drawn.called, "no weight is drawn that is loaded"
    engine = restore.call_args.args[0]
    numbers = sum(weight.numel() for _, weight in parameters.named_weights(engine.stage)) / engine.topology.dp_size
    return Seen(Counter(path.name for path in paths(opens)), len([*paths(queries)]), bytes_read / (12 * numbers))


def with_files(folder: Path, target: Path, files: int) -> Path:
    """Copy a checkpoint into at least that number of files of either kind."""
    target.mkdir(parents=True)
    shutil.copy(folder / "config.json", target)
    for kind in ("model", "optimizer"):
        tensors: dict[str, Tensor] = {}
        for path in sorted(folder.glob(f"{kind}-*")):
            tensors |= load_file(path)
        size = sum(tensor.nbytes for tensor in tensors.values()) // files
        save_torch_state_dict(tensors, target, filename_pattern=kind + "{suffix}.safetensors", max_shard_size=size)
    write_manifest(target, {path.name: record_of(path) for path in target.iterdir()})
    check_fully(target)
    return target


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_reads_its_own_shards_only(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    config = write_config(tmp_path)
    overrides = [f"train.steps={STEPS}", "train.validate_every=null", *LAYOUTS[layout]]
    ranks.run(RANKS, run_program, config, *overrides, f"run.output_dir={tmp_path / 'out'}")
    saved = tmp_path / "out" / "checkpoints" / f"step_{STEPS:08d}"
    seen = []
    for folder in (saved, with_files(saved, tmp_path / "many" / saved.name, 24)):
        resume = [f"checkpoint.resume={folder}", "train.steps=9", "checkpoint.allow_changes=[train.steps]"]
        resume.append(f"run.output_dir={tmp_path / f'out {len(seen)}'}")
        seen.append(ranks.run(RANKS, start, config, [*overrides, *resume], folder))
        # Once to compare a file with the manifest, and once if the rank's tensors lie in it, the neighbours' included.
        most_opens = len(list(folder.glob("*.safetensors"))) / RANKS * (3 if "tensor" in layout else 2) + 8
        for rank in seen[-1]:
            assert 0 < rank.read <= 1.1
            opened = {name: times for name, times in rank.opened.items() if name.endswith(".safetensors")}
            assert sum(opened.values()) <= most_opens, opened
    for few, many in zip(*(by_rank[1:] for by_rank in seen), strict=True):
        assert few.queried == many.queried, "only the first rank queries sizes of files"
        for name in ("manifest.json", "config.json", "model.safetensors.index.json"):
            assert 0 < few.opened[name] == many.opened[name] <= 4
