"""What the ranks read of a checkpoint when a run starts from it: each its own share, and rank 0 what all must know."""

import json
from itertools import accumulate
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtp_dist.checkpoint.manifest import check_fully, record_of
from tests.integration.jobs import write_config
from tests.ranks import Ranks
from tests.unit.checkpoint.starting_on_ranks import start, train

RANKS, STEPS = 4, 2
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tensor and data": (2, ["parallel.tensor=2"]),
    "ZeRO": (1, ["parallel.zero_stage=1"]),
    "bf16, stages": (1, ["train.precision=bf16", "parallel.pipeline=2", "heads.kind=sequential"]),
}
"""Tensor-parallel ranks and overrides."""


def spread(folder: Path, target: Path, files: int) -> Path:
    """The same checkpoint in so many files of either kind, of about the same size."""
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    for kind in ("model", "optimizer"):
        index = json.loads((folder / f"{kind}.safetensors.index.json").read_text())
        tensors: dict[str, Tensor] = {}
        for home in dict.fromkeys(index["weight_map"].values()):
            tensors |= load_file(folder / home)
        ends = accumulate(tensor.numel() for tensor in tensors.values())
        total = sum(tensor.numel() for tensor in tensors.values())
        middles = (end - tensor.numel() / 2 for end, tensor in zip(ends, tensors.values(), strict=True))
        numbers = [int(files * middle / total) for middle in middles]
        names = (f"{kind}-{number + 1:05d}-of-{files:05d}.safetensors" for number in numbers)
        index["weight_map"] = dict(zip(tensors, names, strict=True))
        for home in set(index["weight_map"].values()):
            save_file({name: tensors[name] for name, its in index["weight_map"].items() if its == home}, target / home)
        (target / f"{kind}.safetensors.index.json").write_text(json.dumps(index))
    records = {path.name: record_of(path) for path in target.iterdir()}
    values = {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in records.items()}
    (target / "manifest.json").write_text(json.dumps({"format": 1, "files": values}))
    check_fully(target)
    return target


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_reads_its_share_and_looks_at_no_more(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    config = write_config(tmp_path)
    overrides = [f"train.steps={STEPS}", "train.validate_every=null", "run.output_dir=" + str(tmp_path / "out")]
    tensor_parallel, of_layout = LAYOUTS[layout]
    overrides += of_layout
    ranks.run(RANKS, train, config, overrides)
    saved = tmp_path / "out" / "checkpoints" / f"step_{STEPS:08d}"
    seen = {}
    for files in (1, 24):
        folder = spread(saved, tmp_path / f"in {files}" / saved.name, files)
        resume = [f"checkpoint.resume={folder}", "train.steps=9", "checkpoint.allow_changes=[train.steps]"]
        resume.append(f"run.output_dir={tmp_path / f'out {files}'}")
        seen[files] = ranks.run(RANKS, start, config, [*overrides, *resume], folder)
    # Once to compare a file with the manifest, and once where a rank's tensors lie in it, the neighbours' included.
    tensor_files = len(list(folder.glob("*.safetensors")))
    opens = tensor_files / RANKS * (1 + tensor_parallel) + 8
    for by_rank in seen.values():
        for of_rank in by_rank:
            assert of_rank.drawn == [], "nothing is drawn that is loaded"
            assert 0 < of_rank.bytes_read <= 1.1 * of_rank.share
            opened = {name: times for name, times in of_rank.opened.items() if name.endswith(".safetensors")}
            assert sum(opened.values()) <= opens, opened
    for few, many in zip(*(by_rank[1:] for by_rank in seen.values()), strict=True):
        assert few.looked_at.total() == many.looked_at.total(), "ranks but the first ask for no file's size"
        for name in ("manifest.json", "config.json", "model.safetensors.index.json"):
            assert few.opened[name] == many.opened[name] <= 4
