"""What rank 0 keeps of earlier runs."""

import json
from pathlib import Path

import pytest

from mtp_dist.monitoring.logs import configure_logging
from mtp_dist.monitoring.run_folder import archive_previous_run
from tests.integration import jobs
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.training.ending_on_ranks import order_of_the_end


def test_earlier_runs_are_set_aside_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0)
    for run in ("first", "second"):
        (tmp_path / "metrics.jsonl").write_text(run)
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "wandb").mkdir()  # with the id, as a new run is another one there too
        archive_previous_run(tiny_config(run={"output_dir": str(tmp_path)}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier-1", "earlier-2"]
    assert (tmp_path / "earlier-1/metrics.jsonl").read_text() == "first"
    assert (tmp_path / "earlier-2/metrics.jsonl").read_text() == "second"
    assert all((tmp_path / f"earlier-{number}/checkpoints").is_dir() for number in (1, 2))
    assert str(tmp_path / "earlier-2") in capsys.readouterr().out


def test_a_folder_without_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    archive_previous_run(tiny_config(run={"output_dir": str(tmp_path)}))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_checkpoints_elsewhere_are_set_aside_too(tmp_path: Path) -> None:
    config = tiny_config(run={"output_dir": str(tmp_path / "out")}, checkpoint={"directory": str(tmp_path / "saved")})
    (tmp_path / "saved" / "step_00000010").mkdir(parents=True)
    (tmp_path / "saved" / "notes.txt").touch()
    (tmp_path / "saved" / "latest").touch()
    archive_previous_run(config)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["earlier-1", "notes.txt"]
    aside = tmp_path / "saved/earlier-1"
    assert sorted(path.name for path in aside.iterdir()) == ["latest", "step_00000010"]


def test_folders_that_are_links_are_followed(tmp_path: Path) -> None:
    out, scratch, logs = tmp_path / "out", tmp_path / "scratch", tmp_path / "logs"
    for folder in (out, scratch, logs):
        folder.mkdir()
    (out / "checkpoints").symlink_to(scratch)
    (out / "tensorboard").symlink_to(Path("..") / "logs")
    config = tiny_config(run={"output_dir": str(out)})
    archive_previous_run(config)
    assert not (out / "earlier-1").exists() and list(scratch.iterdir()) == [], "nothing was there"

    for _ in range(2):
        (scratch / "step_00000010").mkdir()
        (scratch / "latest").write_text("step_00000010\n")
        (logs / "events.out.tfevents.1700000000.node-3.4711.0").touch()
        (out / "metrics.jsonl").touch()
        archive_previous_run(config)
    assert (out / "checkpoints").resolve() == scratch and (out / "tensorboard").resolve() == logs
    for number in (1, 2):
        aside = f"earlier-{number}"
        assert sorted(path.name for path in (scratch / aside).iterdir()) == ["latest", "step_00000010"]
        assert [path.name for path in (logs / aside).iterdir()] == ["events.out.tfevents.1700000000.node-3.4711.0"]
        assert [path.name for path in (out / aside).iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("place", ["link", "mount point"])
def test_other_files_stay_in_folders_that_others_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """What lies in a folder of the run itself is moved whole; elsewhere only what a run writes is, by its name."""
    written = {
        "checkpoints": ["latest", "latest.unfinished", "step_00000010", "step_00000020.unfinished"],
        "tensorboard": ["events.out.tfevents.1700000000.node-3.4711.0"],
        "wandb": ["offline-run-20261125_201003-0123abc", "run-20261125_201003-0123abc", "run_id"],
        "profile": [
            "memory_rank_00000.pickle",
            "rank_00000_steps_3-4.json.gz",
            "unfinished_rank_00001_steps_3-4.json.gz",
        ],
        "flight_recorder": ["rank_00000", "rank_00001"],
        "logs": ["rank_00000.log", "rank_100000.log"],
    }
    others = [
        "another run",
        "data.bin",
        "latest_results",
        "run-20261125_201003-fedcba9",
        "step_by_step",
        "trace.json.gz",
    ]
    out = tmp_path / "out"
    out.mkdir()
    for folder, names in written.items():
        target = out / folder
        if place == "link":
            target = tmp_path / f"shared {folder}"
            (out / folder).symlink_to(target)
        for name in [*names, *others]:
            (target / name).mkdir(parents=True)
    (out / "wandb" / "run_id").rmdir()
    (out / "wandb" / "run_id").write_text("0123abc")
    if place == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path.parent == out and path.name in written)
    archive_previous_run(tiny_config(run={"output_dir": str(out)}))
    assert not (out / "earlier-1").exists()
    for folder, names in written.items():
        assert sorted(path.name for path in (out / folder).iterdir()) == sorted([*others, "earlier-1"]), folder
        assert sorted(path.name for path in (out / folder / "earlier-1").iterdir()) == names, folder


def test_no_rank_leaves_before_rank_0_has_done_its_last_work(tmp_path: Path, ranks: Ranks) -> None:
    """srun counts `--wait` from the first rank that ends; what the run has to leave behind is written first."""
    config = jobs.write_config(tmp_path, train={"steps": 2}, log={"tensorboard": False})
    assert ranks.run(2, order_of_the_end, config) == [
        ["sample, with a summary", "barrier", "close"],
        ["barrier", "close"],
    ]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["sample"] == "def f"
