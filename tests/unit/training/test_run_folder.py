"""Archiving of earlier runs, and the order of the last work of a run."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from mtp_dist import pretrain, run
from mtp_dist.training.run_folder import archive_earlier_run
from tests.integration import jobs
from tests.tiny import tiny_config


def archive(output_dir, **sections):
    archive_earlier_run(tiny_config(run={"output_dir": str(output_dir)}, **sections))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_previous_runs_are_archived_completely(tmp_path, caplog):
    (tmp_path / "notes.txt").touch()
    archive(tmp_path)
    assert names(tmp_path) == ["notes.txt"], "there is no run"
    for name in ("first", "second"):
        (tmp_path / "metrics.jsonl").write_text(name)
        (tmp_path / "evaluations.jsonl").touch()  # of another program
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "wandb").mkdir()  # with the id: a new run is a different one there, too
        archive(tmp_path)
    assert names(tmp_path) == ["earlier-1", "earlier-2", "notes.txt"]
    for number, name in enumerate(("first", "second"), 1):
        assert names(tmp_path / f"earlier-{number}") == ["checkpoints", "evaluations.jsonl", "metrics.jsonl", "wandb"]
        assert (tmp_path / f"earlier-{number}/metrics.jsonl").read_text() == name
    assert str(tmp_path / "earlier-2") in caplog.text


def test_checkpoints_in_another_folder_are_archived_there(tmp_path):
    saved = tmp_path / "saved"
    (saved / "step_00000010").mkdir(parents=True)
    for name in ("notes.txt", "latest"):
        (saved / name).touch()
    archive(tmp_path / "out", checkpoint={"directory": str(saved)})
    assert names(saved) == ["earlier-1", "notes.txt"]
    assert names(saved / "earlier-1") == ["latest", "step_00000010"]


@pytest.mark.parametrize(("kind", "rank_logs"), [("link", False), ("link", True), ("mount point", False)])
def test_other_files_stay_in_folders_that_others_may_use(tmp_path, monkeypatch, kind, rank_logs):
    """In a link or a mount point only the files that a run writes are moved, by their names, within it.

    If this run has rank logs, its ranks have moved those of the earlier run into logs/earlier.
    """
    written = {
        "checkpoints": "latest latest.unfinished step_00000010 step_00000020.unfinished",
        "tensorboard": "evaluation events.out.tfevents.1700000000.node-3.4711.0",
        "wandb": "offline-run-20261125_201003-0123abc run-20261125_201003-0123abc run_id",
        "profile": "memory_rank_00000.pickle rank_00000_steps_3-4.json.gz unfinished_rank_00001_steps_3-4.json.gz",
        "flight_recorder": "rank_00000 rank_00001",
        "logs": "rank_00000.log rank_100000.log",
    }
    others = "another data.bin earlier latest_results run-20261125_201003-fedcba9 step_by_step trace.json.gz".split()
    out = tmp_path / "out"
    out.mkdir()
    for folder in written:
        if kind == "link":
            (tmp_path / f"shared {folder}").mkdir()
            (out / folder).symlink_to(Path("..") / f"shared {folder}")
        for name in others:
            (out / folder / name).mkdir(parents=True)
    if kind == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path.parent == out and path.name in written)
    archive(out, log={"rank_logs": rank_logs})
    assert all(names(out / folder) == others for folder in written), "there is no run"
    for number in (1, 2):
        (out / "metrics.jsonl").touch()
        for folder, files in written.items():
            for name in files.split():
                (out / folder / ("earlier" if rank_logs and folder == "logs" else "") / name).mkdir()
        own_log = {"logs": ["rank_00000.log"]} if rank_logs else {}
        if rank_logs:
            (out / "logs/rank_00000.log").touch()
        (out / "wandb" / "run_id").rmdir()
        (out / "wandb" / "run_id").write_text("0123abc")
        archive(out, log={"rank_logs": rank_logs})
        assert names(out / f"earlier-{number}") == ["metrics.jsonl"]
        archives = [f"earlier-{earlier}" for earlier in range(1, number + 1)]
        for folder, files in written.items():
            assert names(out / folder) == sorted([*others, *archives, *own_log.get(folder, [])]), folder
            assert names(out / folder / archives[-1]) == files.split(), folder


def order_of_the_end(config):
    """On each rank: train, and return what this rank does after its last save, and its last barrier."""
    calls, summary = Mock(), config.parent / "out" / "summary.json"
    calls.sample.side_effect = lambda *_: "def f" if summary.exists() else None
    calls.close.side_effect, calls.barrier.side_effect = run.close_topology, dist.barrier
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="0"):
        patch.setattr(run, "_sample", calls.sample)
        patch.setattr(run, "close_topology", calls.close)
        patch.setattr(dist, "barrier", calls.barrier)
        pretrain.main(["--config", str(config)])
    done = [name for name, *_ in calls.mock_calls]
    last = max(index for index, name in enumerate(done) if name == "barrier")
    return [name for name in done[:last] if name != "barrier"] + done[last:]


def test_ranks_leave_together_after_rank_0_has_finished(tmp_path, ranks):
    """srun counts `--wait` from the first rank that ends; what the run has to leave behind is written first."""
    config = jobs.write_config(tmp_path, train={"steps": 2}, log={"tensorboard": False})
    end = ["barrier", "close"]
    assert ranks.run(2, order_of_the_end, config) == [["sample", *end], end]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["sample"] == "def f"
