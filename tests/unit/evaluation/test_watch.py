"""Evaluation of the checkpoints of a run while it trains."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_dist.checkpoint.format import InvalidCheckpointError
from mtp_dist.errors import ConfigError, DataError, UserError
from mtp_dist.evaluation import watch as watch_module
from mtp_dist.evaluation.watch import Metrics, watch
from mtp_dist.training.run_lock import LOCK
from tests.unit.monitoring.test_writers import read_tensorboard

LABEL = "lm-eval --tasks t"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run of 30 steps that has made a checkpoint of steps 10 and 20."""
    folder = tmp_path / "run"
    write_json(folder / "run.json", config={"train": {"steps": 30}, "checkpoint": {"directory": None}})
    for step in (20, 10):
        save(folder, step)
    return folder


def write_json(path: Path, **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def save(run: Path, step: int, content: str = "") -> None:
    write_json(run / f"checkpoints/step_{step:08d}/manifest.json", step=step, content=content)


def evaluate(folder: Path) -> Metrics:
    step = int(folder.name[-8:])
    return {"t/acc": step / 100, "t/loss": float("nan")}


def steps(run: Path, evaluate: Callable[[Path], Metrics] = evaluate, label: str = LABEL) -> list[int]:
    return [evaluation.step for evaluation in watch(run, label, evaluate, once=True)]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines() if line.endswith("}")]


def test_each_checkpoint_is_evaluated_once(run: Path) -> None:
    """By step and as soon as it exists, until the run has reached its last step; a restart repeats none."""
    found = watch(run, LABEL, evaluate, poll_seconds=0.01)
    first = next(found)
    assert (first.step, first.metrics["t/acc"]) == (10, 0.1)
    written = [(line["step"], line["evaluation"], line["metrics"]) for line in lines(run)]
    assert written == [(10, LABEL, {"t/acc": 0.1, "t/loss": None})], "before the next one begins"
    assert next(found).step == 20
    (run / "checkpoints/step_00000030.unfinished").mkdir()
    write_json(run / "summary.json", steps=20)  # of a training that was then made longer
    for step in (25, 28):
        save(run, step)
        assert next(found).step == step
    found.close()

    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 30, "evalu')  # a kill
    write_json(run / "summary.json", steps=30)
    save(run, 30)
    assert [evaluation.step for evaluation in watch(run, LABEL, evaluate)] == [30], "and the watch ends"
    assert [line["step"] for line in lines(run)] == [10, 20, 25, 28, 30]
    assert steps(run) == []
    save(run, 20, "trained again after a rollback")
    assert steps(run) == [20]
    assert steps(run, label="lm-eval --tasks another") == [10, 20, 25, 28, 30]


def test_watch_ends_if_the_training_has_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits during restarts of 10 minutes, also if the second one is over when a slow evaluation ends."""
    trains = (range(1000), range(1600, 4500), range(5100, 9200))
    write_json(run / "run.json", config={"train": {"steps": 9999}, "log": {"tensorboard": False}})
    clock = SimpleNamespace(seconds=0, monotonic=lambda: clock.seconds, sleep=lambda seconds: forward(seconds))

    def forward(seconds: int) -> None:
        clock.seconds += seconds
        (run / LOCK).unlink(missing_ok=True)
        if any(clock.seconds in interval for interval in trains):
            (run / LOCK).write_text(str(clock.seconds // 10))
        if clock.seconds in (1020, 9100):
            save(run, clock.seconds)

    def slowly(folder: Path) -> Metrics:
        if folder.name == "step_00001020":
            forward(3600)
        return evaluate(folder)

    monkeypatch.setattr(watch_module, "time", clock)
    found = watch(run, LABEL, slowly, poll_seconds=20)
    assert [next(found).step for _ in range(4)] == [10, 20, 1020, 9100]
    with pytest.raises(DataError, match="its training has not run for 15 minutes and has not reached its last step"):
        next(found)
    assert 10_100 <= clock.seconds <= 10_200


def test_results_are_in_tensorboard(run: Path) -> None:
    """In a folder of their own: TensorBoard follows the newest event file of a folder, which is the training's."""
    steps(run)
    events = read_tensorboard(run / "tensorboard/evaluation")
    values = {event.step: event.value for event in events.Scalars("eval/t/acc")}
    assert values == pytest.approx({10: 0.1, 20: 0.2})
    assert not [path for path in (run / "tensorboard").iterdir() if path.is_file()]


def test_runs_without_tensorboard_and_with_another_checkpoint_folder(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    config = {"train": {"steps": 30}, "checkpoint": {"directory": str(tmp_path / "elsewhere")}}
    write_json(run / "run.json", config=config | {"log": {"tensorboard": False}})
    assert steps(run) == [10, 20] and not (run / "tensorboard").exists() and not caplog.messages
    write_json(run / "run.json", config={"checkpoint": {"directory": "folder"}})
    assert steps(run) == [] and caplog.messages[0].startswith("folder does not exist yet; ")


@pytest.mark.parametrize(
    ("deleted", "error", "message"),
    [
        (True, OSError("stale file handle"), "step_00000010 was deleted before it was evaluated: skipped"),
        (False, InvalidCheckpointError(Path("step_00000010"), "a hash"), "skipped: step_00000010 is not a valid "),
    ],
)
def test_lost_checkpoints_are_skipped(
    run: Path, caplog: pytest.LogCaptureFixture, deleted: bool, error: Exception, message: str
) -> None:
    def failing(folder: Path) -> Metrics:
        if folder.name.endswith("10"):
            if deleted:
                folder.rename(folder.with_name(f"{folder.name}.1.deleted"))
            raise error
        return evaluate(folder)

    assert steps(run, failing) == [20] and message in caplog.text
    assert [line["step"] for line in lines(run)] == [20]


def test_other_errors_end_the_watch(run: Path, tmp_path: Path) -> None:
    def failing(folder: Path) -> Metrics:
        raise ConfigError("--speculative = 9")

    with pytest.raises(ConfigError, match="--speculative = 9"):
        steps(run, failing)
    with pytest.raises(UserError, match=r"^--watch = '.*' has no run\.json: give the folder of a run that has started"):
        steps(tmp_path)
    for content, message in (("{", r"run\.json cannot be read \(Expecting"), ("[]", "does not contain a JSON object")):
        (run / "run.json").write_text(content)
        with pytest.raises(DataError, match=message):
            steps(run)


def test_results_that_cannot_be_written(run: Path) -> None:
    (run / "tensorboard").touch()
    with pytest.raises(DataError, match=r"cannot write .*tensorboard"):
        steps(run)
