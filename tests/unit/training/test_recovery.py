"""Where the loss jumps: back to the newest checkpoint, and on with samples that were not read yet."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.training.recovery import MAX_ROLLBACKS
from tests.integration import jobs
from tests.ranks import Ranks
from tests.unit.training.faults_on_ranks import Trained, train

BATCH = 8
ROLLBACK = {"steps": 6, "spike_rollback": True, "validate_every": None}


def config_of(folder: Path, stream: bool = False, **sections: dict[str, Any]) -> Path:
    folder.mkdir()
    path = jobs.write_config(
        folder,
        **{"train": ROLLBACK, "parallel": {"pipeline": 2}, "checkpoint": {"every": 2}, "log": {"every": 2}} | sections,
    )
    if stream:
        path.write_text(path.read_text().replace("train:\n  - path:", "train:\n  - stream: true\n    path:"))
        assert "stream: true" in path.read_text()
    return path


def trained(ranks: Ranks, *arguments: Any, world_size: int = 2) -> Trained:
    first, *others = ranks.run(world_size, train, *arguments)
    assert all(other == first for other in others), "every rank does the same"
    return first


@pytest.mark.parametrize("stream", [False, True])
def test_goes_back_and_on_with_new_samples(ranks: Ranks, tmp_path: Path, stream: bool) -> None:
    path = config_of(tmp_path / "a", stream)
    run = trained(ranks, path, {5})
    assert run.reason == "LAST_STEP"
    assert [step for step, _ in run.losses] == [1, 2, 3, 4, 5, 5, 6]
    assert run.losses[4] != run.losses[5]

    out = tmp_path / "a" / "out"
    assert [line["step"] for line in jobs.metrics(out) if "loss/total" in line] == [1, 2, 4, 5, 6]
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    told = [(event["kind"], event["step"]) for event in events if event["kind"] in ("start", "spike", "rollback")]
    assert told == [("start", 0), ("spike", 5), ("rollback", 4)]
    [back] = [event["text"] for event in events if event["kind"] == "rollback"]
    assert back.startswith(f"Rolled back from step 5 to {out}/checkpoints/step_00000004, continuing")
    assert run.ways_back == ["the way back from step 5 to a checkpoint"]
    assert run.logged == [(1, 1, 2), (2, 1, 2), (4, 2, 4), (5, 1, 2), (6, 1, 2)], (
        "since the last, or since it went back"
    )

    other = config_of(tmp_path / "b", stream)
    again = trained(ranks, other, (), (out / "checkpoints" / "step_00000004", 5 * BATCH))
    assert again.losses == run.losses[5:], "to the last bit what a start from there would learn"
    kept = run.losses[:4] + run.losses[5:]
    assert again.recent == run.recent == [of_heads[0] for _, of_heads in kept], "what it would compare with, too"


def test_goes_back_to_an_imported_model(ranks: Ranks, tmp_path: Path) -> None:
    trained(ranks, config_of(tmp_path / "a", train=ROLLBACK | {"steps": 2}), ())
    imported = tmp_path / "step_00000000"
    shutil.copytree(tmp_path / "a" / "out" / "checkpoints" / "step_00000002", imported)
    description = json.loads((imported / "config.json").read_text())
    fresh = {"step": 0, "optimizer_updates": 0, "recent_losses": []}
    (imported / "config.json").write_text(json.dumps(description | fresh))
    late = {"checkpoint": {"every": 100}}
    run = trained(ranks, config_of(tmp_path / "b", **late), {4}, (imported, 0))
    again = trained(ranks, config_of(tmp_path / "c", **late), (), (imported, 4 * BATCH))
    assert [step for step, _ in run.losses] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert again.losses == run.losses[4:], "without the moments of the steps before"


def test_so_many_skipped_steps_in_a_row_end_the_run(ranks: Ranks, tmp_path: Path) -> None:
    config = config_of(tmp_path / "a", train=ROLLBACK | {"max_skipped_steps": 2})
    assert trained(ranks, config, (), None, {2, 4, 6}).reason == "LAST_STEP"
    run = trained(ranks, config_of(tmp_path / "b", train=ROLLBACK | {"max_skipped_steps": 2}), (), None, {2, 4, 5})
    assert "train.max_skipped_steps = 2 steps in a row were skipped, the last one was step 5" in run.reason
    assert [step for step, _ in run.losses] == [1, 2, 3, 4, 5]


def test_without_a_checkpoint_it_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    plain, jumping = config_of(tmp_path / "a"), config_of(tmp_path / "b")
    run = trained(ranks, jumping, {1})
    assert [step for step, _ in run.losses] == [1, 2, 3, 4, 5, 6]
    assert run._replace(ways_back=[]) == trained(ranks, plain, ())
    assert [line["step"] for line in jobs.metrics(tmp_path / "b" / "out") if "loss/total" in line] == [1, 2, 4, 6]
    assert "No checkpoint to roll back to" in (tmp_path / "b" / "out" / "events.jsonl").read_text()


def test_gives_up_where_it_does_not_help(ranks: Ranks, tmp_path: Path) -> None:
    run = trained(ranks, config_of(tmp_path / "a"), range(3, 100))
    assert f"the loss has jumped {MAX_ROLLBACKS + 1} times after" in run.reason and "step_00000002" in run.reason
    assert [step for step, _ in run.losses] == [1, 2] + [3] * (MAX_ROLLBACKS + 1)


def test_a_spike_is_only_told_where_nothing_else_is_asked_for(ranks: Ranks, tmp_path: Path) -> None:
    run = trained(ranks, config_of(tmp_path / "a", train=ROLLBACK | {"spike_rollback": False}), {2, 3})
    assert [step for step, _ in run.losses] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "a" / "out" / "events.jsonl").read_text().count('"spike"') == 2
