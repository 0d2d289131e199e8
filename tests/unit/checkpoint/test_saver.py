"""Saving while two ranks train: what is saved, what happens where it cannot be, and what is loaded of it."""

import json
from pathlib import Path

import pytest
import torch

from mtp_dist.checkpoint.manifest import check_fully, read_manifest, tensor_files
from mtp_dist.checkpoint.reader import TensorReader, load_weights
from tests.parity.comparison import layout_config
from tests.ranks import Ranks
from tests.unit.checkpoint.saving_on_ranks import ROOM, Seen, save_in_all_ways, start_from_damaged

STEPS = 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saver")


@pytest.fixture(scope="module")
def seen(ranks: Ranks, directory: Path) -> list[Seen]:
    config = layout_config((1, 2, 1, False), 2, train={"steps": STEPS})
    return ranks.run(2, save_in_all_ways, config, directory)


def test_training_goes_on_and_one_save_waits_for_the_other(seen: list[Seen]) -> None:
    for of_rank in seen:
        assert of_rank.finished_before == {
            "training went on": False,
            "the next save": True,
            "the run's last save ended": True,
        }


def test_what_is_saved_is_what_there_was_when_save_was_called(seen: list[Seen], directory: Path) -> None:
    assert seen
    waited, meanwhile, later = (
        directory / name for name in ("waited/step_00000001", "async/step_00000001", "async/step_00000002")
    )
    records = read_manifest(waited)
    assert len(records) == 7
    for name in records.keys() - {"config.json"}:
        assert (waited / name).read_bytes() == (meanwhile / name).read_bytes(), name
    for name in tensor_files(records):
        assert (waited / name).read_bytes() != (later / name).read_bytes(), "training changes every file"


def test_failing_writes_are_told_and_tried_again(seen: list[Seen], directory: Path) -> None:
    failing = directory / "failing"
    file = "model-00002-of-00002.safetensors"

    def told(step: int) -> str:
        folder = failing / f"step_{step:08d}.unfinished"
        return f"rank 1 cannot write into checkpoint.directory: {folder / file}: "

    reports, others = seen[0].reports, seen[1].reports
    assert others == []
    assert all("File too large" in report for report in reports), reports
    assert [report.split(":")[0] for report in reports] == [
        *["checkpoint of step 5"] * 2,
        *["checkpoint of step 6"] * 3,
        "checkpoint of step 6 is NOT saved",
        *[f"checkpoint of step {STEPS}"] * 3,
        f"checkpoint of step {STEPS} is NOT saved",
    ]
    assert told(5) in reports[0] and reports[0].endswith("; trying again in 2 s") and "in 10 s" in reports[1]
    for of_rank in seen:
        assert [error.startswith(told(step)) for error, step in zip(of_rank.errors, (6, STEPS), strict=True)]
    kept = ["step_00000004", "step_00000005"]
    assert seen[0].left == ["latest", *kept], "none goes before the next one is there"
    assert (failing / "latest").read_text() == "step_00000007\n"
    names = sorted(path.name for path in failing.glob("step_*"))
    assert names == ["step_00000005", "step_00000007"]
    for step in (5, 7):
        sizes = [record.bytes for record in check_fully(failing / f"step_{step:08d}").values()]
        assert max(sizes) > ROOM
    before, after = (load_weights(failing / f"step_{step:08d}")[1] for step in (5, 7))
    assert not torch.equal(before["embedding.weight"], after["embedding.weight"]), "the run went on"


def test_a_mistake_in_the_thread_ends_the_run(seen: list[Seen]) -> None:
    for of_rank in seen:
        assert of_rank.bugs == ["IndexError('list index out of range')"], "which the next save raises"


def test_damaged_tensors_are_never_loaded(ranks: Ranks, seen: list[Seen], directory: Path) -> None:
    assert seen
    folder = directory / "async"
    config = layout_config((2, 1, 1, False), 2, checkpoint={"directory": str(folder)}, train={"steps": STEPS})
    files = [path.name for path in (folder / f"step_{STEPS:08d}").iterdir()]
    first, second = ranks.run(2, start_from_damaged, config, folder)
    assert first.starts == second.starts
    assert first.starts.pop("nothing") == f"step_{STEPS:08d}" and first.warnings.pop("nothing") == ""
    every, disks = first.starts.pop("all"), first.starts.pop("other disks")
    assert "optimizer-0000" in every and "there is no older one to use instead" in every
    newest = folder / f"step_{STEPS:08d}"
    assert disks.startswith(f"rank 0 would start from {newest}, which rank 1 does not see: checkpoint.directory must ")
    assert len(first.starts) == 3 * len(files)
    for damage, start in first.starts.items():
        assert start == "step_00000002", damage
        [warning] = first.warnings[damage].splitlines()
        assert f"step_{STEPS:08d} is " in warning and warning.endswith("step_00000002")
        name = damage.split(":")[0]
        assert name in warning or name == "manifest.json"


def test_config_json_tells_of_the_run(seen: list[Seen], directory: Path) -> None:
    assert seen
    values = json.loads((directory / "waited" / "step_00000001" / "config.json").read_text())
    assert values["layout"] == {"tensor": 1, "pipeline": 2, "data": 1, "world_size": 2, "zero_stage": 0}
    assert TensorReader(directory / "waited" / "step_00000001", "optimizer").shapes()["exp_avg.final_norm.weight"] == (
        32,
    )
