"""Saving while training goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import sleep
from typing import TypeVar

from mtp_dist.checkpoint.format import UNFINISHED, CheckpointMetadata, RunState, checkpoint_path, with_suffix_appended
from mtp_dist.checkpoint.retention import prune_checkpoints
from mtp_dist.checkpoint.save import (
    Snapshot,
    Tensors,
    gather_owned_tensors,
    take_snapshot,
    write_metadata,
    write_tensor_files,
)
from mtp_dist.checkpoint.writer import create_staging_dir, publish
from mtp_dist.config import Config
from mtp_dist.distributed.topology import GlooGroups, all_gather_objects
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.errors import ConfigError

RETRY_DELAYS_S = (2.0, 10.0, 60.0)
"""Seconds before the second, third, .. time that a checkpoint is tried to be written."""

T = TypeVar("T")


class _NotWrittenError(Exception):
    """A rank could not write; every rank raises it."""


class CheckpointSaver:
    """Copies what is to be saved to host memory, which training waits for, and writes it in a thread of each rank.

    The threads gather whole tensors and agree on each part of the work through process groups of their own. What cannot
    be written is told through `note`, on rank 0, and tried again; `on_saved` is called there with the step of each
    that is written.
    """

    def __init__(
        self,
        config: Config,
        engine: TrainingEngine,
        groups: GlooGroups,
        note: Callable[[str], None],
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config = config
        self.engine = engine
        self._groups = groups
        self._note = note
        self._on_saved = on_saved
        self._thread: Thread | None = None
        self._not_saved: str | None = None
        self._bug: BaseException | None = None

    def save(self, state: RunState, last: bool = False) -> None:
        """Save the state after update `state.step`; every rank calls it.

        Waits for the save before, and for this one where it is the run's last. state counts on rank 0 only. Raises
        ConfigError, on every rank, where the last one cannot be written.
        """
        self.join()
        snapshot = take_snapshot(self.config, self.engine, state)
        # A daemon: a run that fails must end although other ranks no longer answer.
        self._thread = Thread(target=self._run, args=(snapshot,), daemon=True)
        self._thread.start()
        if last:
            self.wait()

    def join(self) -> None:
        """Until no checkpoint is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._bug:
            raise self._bug

    def wait(self) -> None:
        """Until the checkpoint is there. Raises ConfigError, on every rank, where it could not be written."""
        self.join()
        if self._not_saved:
            raise ConfigError(self._not_saved)

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._not_saved = self._write_or_try_again(snapshot)
        except BaseException as error:  # which `join` raises
            self._bug = error

    def _write_or_try_again(self, snapshot: Snapshot) -> str | None:
        """Returns why there is no checkpoint in the end."""
        final = checkpoint_path(self.config, snapshot.description.step)
        unfinished = with_suffix_appended(final, UNFINISHED)
        what = f"checkpoint of step {snapshot.description.step}"
        tensors = gather_owned_tensors(snapshot, self.engine.topology, self._groups.tensor)
        for pause in (*RETRY_DELAYS_S, None):
            try:
                self._write(snapshot.description, tensors, unfinished, final)
                if self.engine.topology.rank == 0:
                    self._on_saved(snapshot.description.step)
                return None
            except _NotWrittenError as error:
                wrong = str(error)
            if self.engine.topology.rank == 0:  # on a full disk the logs need the room
                shutil.rmtree(unfinished, ignore_errors=True)
            if pause is not None:
                self._say(f"{what}: {wrong}; trying again in {pause:g} s")
                sleep(pause)
        self._say(f"{what} is NOT saved: {wrong}")
        return wrong

    def _write(
        self, description: CheckpointMetadata, tensors: dict[str, Tensors], unfinished: Path, final: Path
    ) -> None:
        topology = self.engine.topology
        self._on_rank_0(lambda: create_staging_dir(unfinished), unfinished)
        written = self._on_all_ranks(lambda: write_tensor_files(unfinished, tensors, topology), unfinished)
        tensor_files = {name: file for of_rank in written if of_rank for name, file in of_rank.items()}

        def finish() -> None:
            write_metadata(unfinished, description, tensor_files)
            publish(unfinished, final)

        self._on_rank_0(finish, unfinished)
        if topology.rank == 0:
            self._prune_checkpoints(description.step)

    def _prune_checkpoints(self, step: int) -> None:
        settings = self.config.checkpoint
        try:
            prune_checkpoints(self.config.checkpoint_dir, step, settings.keep_last, settings.keep_every)
        except OSError as error:
            self._say(f"cannot delete an old checkpoint: {error.filename}: {error.strerror}")

    def _on_rank_0(self, action: Callable[[], None], folder: Path) -> None:
        self._on_all_ranks(action if self.engine.topology.rank == 0 else lambda: None, folder)

    def _on_all_ranks(self, action: Callable[[], T], folder: Path) -> list[T | None]:
        """What it returns on each rank. Where one cannot write all raise: else they would wait for it for ever."""
        wrong = result = None
        try:
            result = action()
        except OSError as error:
            wrong = f"cannot write into checkpoint.directory: {error.filename or folder}: {error.strerror or error}"
        answers = all_gather_objects((wrong, result), self._groups.all)
        for rank, (of_rank, _) in enumerate(answers):
            if of_rank:
                raise _NotWrittenError(of_rank if rank == 0 else f"rank {rank} {of_rank}")
        return [result for _, result in answers]

    def _say(self, text: str) -> None:
        if self.engine.topology.rank == 0:
            self._note(text)
