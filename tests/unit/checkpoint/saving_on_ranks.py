"""What the tests of the saver run on every rank: one training, saved in every way that may go wrong."""

import contextlib
import io
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mtp_dist.checkpoint.format import RunState
from mtp_dist.config import Config
from mtp_dist.errors import ConfigError
from tests.engines import open_engine, take_step
from tests.unit.checkpoint.folders import damages, flip

ROOM = 4096
"""Bytes that a file may have on a disk that is full: enough for JSON, not for tensors."""


@dataclass
class Seen:
    """What one rank saw."""

    finished_before: dict[str, bool] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """In `failing`, after the first save that failed for good."""
    starts: dict[str, str] = field(default_factory=dict)
    """By damage, where all ranks agreed to start, or the error."""
    warnings: dict[str, str] = field(default_factory=dict)


class Training:
    """A model in training, saved on demand."""

    def __init__(self, config: Config) -> None:
        from mtp_dist.distributed.topology import new_gloo_groups

        self.config, self.engine = config, open_engine(config)
        self.topology = self.engine.topology
        self.groups = new_gloo_groups(self.topology)
        self.reports: list[str] = []

    def step(self, step: int) -> None:
        take_step(self.engine, step, rate=1e-3)

    def saver_into(self, directory: Path, keep_last: int | None = None) -> Any:
        from mtp_dist.checkpoint.saver import CheckpointSaver

        checkpoint = self.config.checkpoint.model_copy(update={"directory": str(directory), "keep_last": keep_last})
        config = self.config.model_copy(update={"checkpoint": checkpoint})
        return CheckpointSaver(config, self.engine, self.groups, self.reports.append)


@contextlib.contextmanager
def writing_held_back() -> Iterator[Callable[[], None]]:
    """No tensor is written until what is yielded is called."""
    from mtp_dist.checkpoint import saver

    release = threading.Event()
    write_tensor_files = saver.write_tensor_files

    def wait_first(*arguments: Any) -> Any:
        assert release.wait(60)
        return write_tensor_files(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "write_tensor_files", wait_first)
        yield release.set


@contextlib.contextmanager
def full_disk(attempts: int) -> Iterator[None]:
    """This process cannot write its tensors in so many attempts."""
    from mtp_dist.checkpoint import saver

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = 0

    def create_staging_dir(seconds: float) -> None:
        nonlocal failed
        failed += 1
        if failed == attempts:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "sleep", create_staging_dir)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_in_all_ways(config: Config, directory: Path) -> Seen:
    """Into `waited`, `async` and `failing` below directory; `failing` keeps the last two."""
    seen, training = Seen(), Training(config)
    training.step(1)
    waited = training.saver_into(directory / "waited")
    waited.save(RunState(1))
    waited.wait()
    _save_while_training(training, directory, seen)
    _fail(training, directory / "failing", seen)
    _break(training, directory / "broken", seen)
    seen.reports = training.reports
    return seen


def _save_while_training(training: Training, directory: Path, seen: Seen) -> None:
    saver = training.saver_into(directory / "async")
    folder = directory / "async" / "step_00000001"
    with writing_held_back() as release:
        saver.save(RunState(1))
        training.step(2)
        seen.finished_before["training went on"] = folder.exists()
        timer = threading.Timer(0.3, release)
        timer.start()
        saver.save(RunState(2))
        seen.finished_before["the next save"] = folder.exists()
        timer.join()
    saver.wait()
    training.step(3)
    saver.save(RunState(training.config.train.steps), last=True)
    last = directory / "async" / f"step_{training.config.train.steps:08d}"
    seen.finished_before["the run's last save ended"] = last.exists()


def _fail(training: Training, directory: Path, seen: Seen) -> None:
    """Rank 1's disk is full for two attempts, then for all of one save, then for all of the run's last one."""
    saver = training.saver_into(directory, keep_last=2)
    failing_attempts = {4: 0, 5: 2, 6: 99, 7: 0, training.config.train.steps: 99}
    for step, attempts in failing_attempts.items():
        training.step(step)
        with full_disk(attempts) if attempts and training.topology.rank == 1 else no_pauses():
            try:
                saver.save(RunState(step))
                saver.wait()
            except ConfigError as error:
                seen.errors.append(str(error))
        if step == 6 and training.topology.rank == 0:
            seen.left = sorted(path.name for path in directory.iterdir())


def _break(training: Training, directory: Path, seen: Seen) -> None:
    """A mistake of ours in the thread."""
    from mtp_dist.checkpoint import saver as module

    saver = training.saver_into(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_tensor_files", lambda *_: [][0])
        saver.save(RunState(1))
        try:
            saver.save(RunState(2))
        except IndexError as error:
            seen.bugs.append(repr(error))


@contextlib.contextmanager
def no_pauses() -> Iterator[None]:
    from mtp_dist.checkpoint import saver

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "sleep", lambda seconds: None)
        yield


def start_from_damaged(config: Config, directory: Path) -> Seen:
    """Each tensor file of the newest checkpoint is damaged in turn, then one of every checkpoint."""
    import torch.distributed as dist

    from mtp_dist.checkpoint import restore as load
    from mtp_dist.checkpoint.restore import agree_on_resume_point
    from mtp_dist.distributed.device import select_device
    from mtp_dist.distributed.topology import initialize_topology, new_gloo_groups

    topology, seen = initialize_topology(config, select_device(config)), Seen()
    group = new_gloo_groups(topology).all

    def start(name: str) -> None:
        dist.barrier()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                point = agree_on_resume_point(config, topology, group)
                seen.starts[name] = point.folder.name if point else "the beginning"
            except ConfigError as error:
                seen.starts[name] = str(error)
        seen.warnings[name] = said.getvalue()
        dist.barrier()

    def on_rank_0(action: Callable[[], object]) -> None:
        dist.barrier()
        if topology.rank == 0:
            action()
        dist.barrier()

    newest, *others = sorted((path for path in directory.glob("step_*")), reverse=True)
    start("nothing")
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for damage in ("middle byte", "cut off", "gone"):
            on_rank_0(damages(path)[damage])
            start(f"{path.name}: {damage}")
            on_rank_0(lambda path=path, content=content: path.write_bytes(content))
    for folder in (newest, *others):
        on_rank_0(lambda folder=folder: flip(next(folder.glob("optimizer-*-of-*")), -1))
    start("all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "SECONDS_BETWEEN_LOOKS", 0.0)
        if topology.rank == 1:
            patch.setattr(Path, "is_dir", lambda _: False)
        start("other disks")
    return seen
