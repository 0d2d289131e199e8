"""Trainings on every rank with loss spikes, skipped steps and signals at chosen steps."""

import itertools
import json
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mtp_dist.checkpoint.find import ResumePoint
from mtp_dist.checkpoint.format import read_metadata
from mtp_dist.checkpoint.restore import restore
from mtp_dist.checkpoint.saver import CheckpointSaver
from mtp_dist.data.datasets import load_datasets
from mtp_dist.distributed.topology import new_gloo_groups
from mtp_dist.errors import TrainingDivergedError
from mtp_dist.monitoring.callback import Callback, CallbackList
from mtp_dist.monitoring.logs import configure_logging
from mtp_dist.monitoring.rank0 import rank0_callbacks
from mtp_dist.training.stopping import StopSignals
from mtp_dist.training.trainer import MAX_ROLLBACKS, Trainer
from tests.engines import open_engine
from tests.integration import jobs
from tests.tiny import load_resolved

BATCH = 8
ROLLBACK = {"steps": 6, "spike_rollback": True, "validate_every": None}


class Recorder(Callback):
    """Records the events of a rank, and lets a signal reach it during the step `signalled_in`."""

    def __init__(self, signals, signalled_in):
        self.signals, self.signalled_in = signals, signalled_in
        self.losses, self.logged, self.events = [], [], []

    def on_step(self, metrics):
        self.events.append(f"step {metrics.step}")
        self.losses.append((metrics.step, metrics.heads.losses))
        self.logged += [(metrics.step, stats.busy_seconds, stats.schedule_seconds) for stats in metrics.ranks[:1]]
        if metrics.step + 1 == self.signalled_in:
            self.signals.received = signal.SIGUSR1

    def on_stop(self, step, number):
        self.events.append(f"stop {step} by {signal.Signals(number).name}")

    def on_validation(self, step, *_):
        self.events.append(f"validation {step}")


def add_faults(trainer, spikes, skips):
    """Let chosen steps of those that are trained, counted from 1, be spikes and skipped ones."""
    compared, trained = itertools.count(1), itertools.count(1)
    update, train_step = trainer.spikes.update, trainer.train_step

    def faulty_update(loss):
        update(loss)
        return "a jump" if next(compared) in spikes else None

    def faulty_step(*arguments):
        metrics, number = train_step(*arguments)
        rates = {group["lr"] for group in trainer.engine.pipeline.optimizer.param_groups}
        assert rates == {metrics.learning_rate, *metrics.learning_rates.values()}
        return replace(metrics, skipped="a fault" if next(trained) in skips else None), number

    trainer.spikes.update, trainer.train_step = faulty_update, faulty_step


def train(path, spikes=(), start=None, skips=(), signalled_in=None):
    """On each rank: train with passes of 1 second per step, and 2 seconds for all of its micro-batches.

    start: a checkpoint and the number of samples to pass over. signalled_in: step by rank.
    """
    config = load_resolved(path)
    engine = open_engine(config)
    topology = engine.topology
    configure_logging(topology.rank)
    groups, datasets = new_gloo_groups(topology), load_datasets(config)
    point, samples_read = None, 0
    if start:
        folder, samples_read = start
        restore(engine, folder)
        saved = read_metadata(folder)
        point = ResumePoint(folder, saved.step, saved.config, recent_losses=saved.recent_losses)
        if config.data.train[0].stream:
            datasets.train.read(0, samples_read)
    signals, phases, callbacks = StopSignals(), [], []
    recorder = Recorder(signals, signalled_in and signalled_in[topology.rank])
    if topology.rank == 0:
        step = point.step if point else 0
        callbacks = rank0_callbacks(config, topology, datasets.validation, [""] * topology.world_size, step)
    saver = CheckpointSaver(config, engine, groups)
    save = saver.save
    saver.save = lambda state, last: (recorder.events.append(f"save {state.step}"), save(state, last))
    observers, watchdog = CallbackList([*callbacks, recorder]), SimpleNamespace(enter=phases.append)
    trainer = Trainer(config, engine, datasets, saver, observers, signals, watchdog, groups.all, point, samples_read)
    add_faults(trainer, spikes, skips)
    engine.clock = SimpleNamespace(begin=lambda: None, seconds=lambda: (1.0, 2.0))
    try:
        reason = trainer.fit().reason.name
    except TrainingDivergedError as error:
        reason = str(error)
    saver.join()
    return SimpleNamespace(
        reason=reason,  # name of the stop reason, or the error message
        steps=[step for step, _ in recorder.losses],
        losses=recorder.losses,  # step and head losses of each trained step
        recent=trainer.spikes.losses,  # losses that the next one would be compared with
        logged=recorder.logged,  # steps with rank statistics, rank 0's seconds of passes and of micro-batches
        phases=phases,  # of the watchdog
        events=", ".join(recorder.events),
    )


def write_config(folder, stream=False, **sections):
    folder.mkdir()
    data = {"data": {"train": [{"path": str(folder / "corpus"), "stream": stream}]}, "parallel": {"pipeline": 2}}
    every_2 = {"checkpoint": {"every": 2}, "log": {"every": 2}}
    return jobs.write_config(folder, **{"train": ROLLBACK} | data | every_2 | sections)


def train_on(ranks, *arguments):
    first, *others = ranks.run(2, train, *arguments)
    assert all(other == first for other in others), "every rank does the same"
    return first


@pytest.mark.parametrize("stream", [False, True])
def test_rollback_continues_with_new_samples(ranks, tmp_path, stream):
    optimizer = {"multipliers": {"trunk": [[1, 0], [5, 0.5]]}}
    run = train_on(ranks, write_config(tmp_path / "a", stream, optimizer=optimizer), {5})
    assert run.reason == "LAST_STEP" and run.steps == [1, 2, 3, 4, 5, 5, 6]
    assert run.losses[4] != run.losses[5]

    out = tmp_path / "a" / "out"
    steps = [line for line in jobs.metrics(out) if "loss/total" in line]
    assert [line["step"] for line in steps] == [1, 2, 4, 5, 6]
    factors = [line["train/learning_rate/trunk"] / line["train/learning_rate"] for line in steps]
    assert factors == [0, 0, 0, 0.5, 0.5], "a rollback does not change which step has which"
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    spike, rollback = [event for event in events if event["kind"] in ("spike", "rollback")]
    assert (spike["kind"], spike["step"], rollback["step"]) == ("spike", 5, 4)
    checkpoint = out / "checkpoints" / "step_00000004"
    assert rollback["text"] == f"Rolled back from step 5 to {checkpoint}, continuing after step 4 with new samples"
    assert [phase for phase in run.phases if "rollback" in phase] == ["the rollback from step 5 to a checkpoint"]
    assert run.logged == [(1, 1, 2), (2, 1, 2), (4, 2, 4), (5, 1, 2), (6, 1, 2)], "since the last log or rollback"

    again = train_on(ranks, write_config(tmp_path / "b", stream, optimizer=optimizer), (), (checkpoint, 5 * BATCH))
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
    assert run.steps == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert again.losses == run.losses[4:], "without the moments of the steps before"


def test_rollback_without_a_checkpoint_continues(ranks, tmp_path):
    run = train_on(ranks, write_config(tmp_path / "spike"), {1})
    assert run.steps == [1, 2, 3, 4, 5, 6]
    without = train_on(ranks, write_config(tmp_path / "no spike"))
    assert vars(run) == vars(without) | {"phases": run.phases}
    out = tmp_path / "spike" / "out"
    assert [line["step"] for line in jobs.metrics(out) if "loss/total" in line] == [1, 2, 4, 6]
    assert "No checkpoint to roll back to, continuing after step 1" in (out / "events.jsonl").read_text()


def test_rollbacks_that_do_not_help_end_the_run(ranks, tmp_path):
    run = train_on(ranks, write_config(tmp_path / "a"), range(3, 100))
    assert f"the loss has jumped {MAX_ROLLBACKS + 1} times after" in run.reason and "step_00000002" in run.reason
    assert run.steps == [1, 2] + [3] * (MAX_ROLLBACKS + 1)


def test_spike_without_rollback_is_only_logged(ranks, tmp_path):
    run = train_on(ranks, write_config(tmp_path / "a", train=ROLLBACK | {"spike_rollback": False}), {2, 3})
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "a" / "out" / "events.jsonl").read_text().count('"spike"') == 2


def test_skipped_steps_in_a_row_end_the_run(ranks, tmp_path):
    two = {"train": ROLLBACK | {"max_skipped_steps": 2}}
    assert train_on(ranks, write_config(tmp_path / "a", **two), (), None, {2, 4, 6}).reason == "LAST_STEP"
    run = train_on(ranks, write_config(tmp_path / "b", **two), (), None, {2, 4, 5})
    assert "train.max_skipped_steps = 2 steps in a row were skipped, the last one was step 5" in run.reason
    assert run.steps == [1, 2, 3, 4, 5]


# The checkpoint comes first, since the time may be short; a resumed run validates only after later steps.
AFTER_2 = "step 1, step 2, stop 2 by SIGUSR1, save 2, validation 2"
AFTER_3 = "step 1, step 2, validation 2, step 3, stop 3 by SIGUSR1, save 3"
NEVER = "step 1, step 2, validation 2, step 3, step 4, validation 4, save 4"


@pytest.mark.parametrize(
    ("signalled_in", "expected"),
    [((None, 2), AFTER_2), ((3, 2), AFTER_2), ((3, None), AFTER_3), ((None, None), NEVER), ((4, 4), NEVER)],
)
def test_all_ranks_stop_after_the_same_step(tmp_path, ranks, signalled_in, expected):
    config = jobs.write_config(tmp_path, parallel={"pipeline": 2}, train={"steps": 4, "validate_every": 2})
    for run in ranks.run(2, train, config, (), None, (), signalled_in):
        assert (run.reason == "LAST_STEP", run.events) == (expected == NEVER, expected)
        assert run.phases[:5] == ["the start", "step 1", "the log of step 1", "step 2", "the log of step 2"]
        assert expected == AFTER_2 or run.phases[5] == "the validation after step 2"
