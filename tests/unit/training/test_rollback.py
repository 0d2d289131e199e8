"""After a loss spike: back to the newest checkpoint, then on with samples that were not read yet."""

import json
import shutil

import pytest

from mtp_dist.training.trainer import MAX_ROLLBACKS
from tests.integration import jobs
from tests.unit.training.faults_on_ranks import train

BATCH = 8
ROLLBACK = {"steps": 6, "spike_rollback": True, "validate_every": None}


def write_config(folder, stream=False, **sections):
    folder.mkdir()
    every_2 = {"checkpoint": {"every": 2}, "log": {"every": 2}}
    path = jobs.write_config(folder, **{"train": ROLLBACK, "parallel": {"pipeline": 2}} | every_2 | sections)
    if stream:
        path.write_text(path.read_text().replace("train:\n  - path:", "train:\n  - stream: true\n    path:"))
        assert "stream: true" in path.read_text()
    return path


def train_on(ranks, *arguments):
    first, *others = ranks.run(2, train, *arguments)
    assert all(other == first for other in others), "every rank does the same"
    return first


def steps(run):
    return [step for step, _ in run.losses]


@pytest.mark.parametrize("stream", [False, True])
def test_rollback_continues_with_new_samples(ranks, tmp_path, stream):
    run = train_on(ranks, write_config(tmp_path / "a", stream), {5})
    assert run.reason == "LAST_STEP" and steps(run) == [1, 2, 3, 4, 5, 5, 6]
    assert run.losses[4] != run.losses[5]

    out = tmp_path / "a" / "out"
    assert [line["step"] for line in jobs.metrics(out) if "loss/total" in line] == [1, 2, 4, 5, 6]
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    spike, rollback = [event for event in events if event["kind"] in ("spike", "rollback")]
    assert (spike["kind"], spike["step"], rollback["step"]) == ("spike", 5, 4)
    checkpoint = out / "checkpoints" / "step_00000004"
    assert rollback["text"] == f"Rolled back from step 5 to {checkpoint}, continuing after step 4 with new samples"
    assert [phase for phase in run.phases if "rollback" in phase] == ["the rollback from step 5 to a checkpoint"]
    assert run.logged == [(1, 1, 2), (2, 1, 2), (4, 2, 4), (5, 1, 2), (6, 1, 2)], "since the last log or rollback"

    again = train_on(ranks, write_config(tmp_path / "b", stream), (), (checkpoint, 5 * BATCH))
    assert again.losses == run.losses[5:], "bitwise as a start from the checkpoint"
    kept = run.losses[:4] + run.losses[5:]
    assert again.recent == run.recent == [losses[0] for _, losses in kept], "the spike detector, too"


def test_rollback_to_an_imported_model(ranks, tmp_path):
    train_on(ranks, write_config(tmp_path / "a", train=ROLLBACK | {"steps": 2}))
    imported = tmp_path / "step_00000000"
    shutil.copytree(tmp_path / "a" / "out" / "checkpoints" / "step_00000002", imported)
    metadata, fresh = imported / "config.json", {"step": 0, "optimizer_updates": 0, "recent_losses": []}
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | fresh))
    late = {"checkpoint": {"every": 100}}
    run = train_on(ranks, write_config(tmp_path / "b", **late), {4}, (imported, 0))
    again = train_on(ranks, write_config(tmp_path / "c", **late), (), (imported, 4 * BATCH))
    assert steps(run) == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert again.losses == run.losses[4:], "without the moments of the steps before"


def test_rollback_without_a_checkpoint_continues(ranks, tmp_path):
    run = train_on(ranks, write_config(tmp_path / "spike"), {1})
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    without = train_on(ranks, write_config(tmp_path / "no spike"))
    assert run == without._replace(phases=run.phases)
    out = tmp_path / "spike" / "out"
    assert [line["step"] for line in jobs.metrics(out) if "loss/total" in line] == [1, 2, 4, 6]
    assert "No checkpoint to roll back to, continuing after step 1" in (out / "events.jsonl").read_text()


def test_rollbacks_that_do_not_help_end_the_run(ranks, tmp_path):
    run = train_on(ranks, write_config(tmp_path / "a"), range(3, 100))
    assert f"the loss has jumped {MAX_ROLLBACKS + 1} times after" in run.reason and "step_00000002" in run.reason
    assert steps(run) == [1, 2] + [3] * (MAX_ROLLBACKS + 1)


def test_spike_without_rollback_is_only_logged(ranks, tmp_path):
    run = train_on(ranks, write_config(tmp_path / "a", train=ROLLBACK | {"spike_rollback": False}), {2, 3})
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "a" / "out" / "events.jsonl").read_text().count('"spike"') == 2


def test_skipped_steps_in_a_row_end_the_run(ranks, tmp_path):
    two = {"train": ROLLBACK | {"max_skipped_steps": 2}}
    assert train_on(ranks, write_config(tmp_path / "a", **two), (), None, {2, 4, 6}).reason == "LAST_STEP"
    run = train_on(ranks, write_config(tmp_path / "b", **two), (), None, {2, 4, 5})
    assert "train.max_skipped_steps = 2 steps in a row were skipped, the last one was step 5" in run.reason
    assert steps(run) == [1, 2, 3, 4, 5]
