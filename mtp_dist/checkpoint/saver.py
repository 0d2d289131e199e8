"""Saving checkpoints in the background while training continues."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from time import sleep
from typing import TypeVar

from mtp_dist.checkpoint.format import (
    UNFINISHED,
    CheckpointMetadata,
    RunState,
    checkpoint_path,
)
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
from mtp_dist.distributed.collectives import all_gather_objects
from mtp_dist.distributed.topology import GlooGroups
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.errors import CheckpointError
from mtp_dist.fs import add_suffix

RETRY_DELAYS_S = (2.0, 10.0, 60.0)
"""Delays before the second, third, ... attempt to write a checkpoint, in seconds."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class _WriteError(Exception):
    """A write that failed on one rank; raised on every rank."""


class CheckpointSaver:
    """A saver that copies the state to host memory while training waits, and writes it in a thread of each rank.

    The threads gather full tensors and agree on each step of a save through GlooGroups. The main thread uses one of
    these groups too, but only after `join`. A save that fails is logged and tried again.
    """

    def __init__(self, config: Config, engine: TrainingEngine, groups: GlooGroups) -> None:
        self.config = config
        self.engine = engine
        self._groups = groups
        self._thread: Thread | None = None
        self._failure: str | None = None
        self._bug: BaseException | None = None

    def save(self, state: RunState, last: bool = False) -> None:
        """Save the state after step `state.step`. A collective over all ranks.

        Wait for the previous save, and for this one if it is the run's last. Only rank 0's `state` is saved. Raise
        CheckpointError, on every rank, if the last one cannot be written.
        """
        self.join()
        snapshot = take_snapshot(self.config, self.engine, state)
        # A daemon: a run that fails must end although other ranks no longer answer.
        self._thread = Thread(target=self._run, args=(snapshot,), daemon=True)
        self._thread.start()
        if last:
            self.wait()

    def join(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._bug:
            raise self._bug

    def wait(self) -> None:
        """Wait until the checkpoint is written. Raise CheckpointError, on every rank, if it could not be."""
        self.join()
        if self._failure:
            raise CheckpointError(self._failure)

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._failure = self._write_with_retries(snapshot)
        except BaseException as error:  # which `join` raises
            self._bug = error

    def _write_with_retries(self, snapshot: Snapshot) -> str | None:
        """Return None, or why there is no checkpoint after the last attempt."""
        step = snapshot.metadata.step
        final = checkpoint_path(self.config, step)
        staging = add_suffix(final, UNFINISHED)
        tensors = gather_owned_tensors(snapshot, self.engine.topology, self._groups.tensor)
        for delay in (*RETRY_DELAYS_S, None):
            try:
                self._write(snapshot.metadata, tensors, staging, final)
                logger.info("Saved the checkpoint of step %d", step, extra={"event": "checkpoint"})
                return None
            except _WriteError as error:
                failure = str(error)
            if self.engine.topology.rank == 0:  # on a full disk the logs need the space
                shutil.rmtree(staging, ignore_errors=True)
            if delay is not None:
                _warn("checkpoint of step %d: %s; trying again in %g s", step, failure, delay)
                sleep(delay)
        _warn("checkpoint of step %d is NOT saved: %s", step, failure)
        return failure

    def _write(self, metadata: CheckpointMetadata, tensors: dict[str, Tensors], staging: Path, final: Path) -> None:
        topology = self.engine.topology
        self._on_rank_0(lambda: create_staging_dir(staging), staging)
        written = self._on_all_ranks(lambda: write_tensor_files(staging, tensors, topology), staging)
        tensor_files = {name: file for rank_files in written if rank_files for name, file in rank_files.items()}

        def finish() -> None:
            write_metadata(staging, metadata, tensor_files)
            publish(staging, final)

        self._on_rank_0(finish, staging)
        if topology.rank == 0:
            self._prune(metadata.step)

    def _prune(self, step: int) -> None:
        settings = self.config.checkpoint
        try:
            prune_checkpoints(self.config.checkpoint_dir, step, settings.keep_last, settings.keep_every)
        except OSError as error:
            _warn("cannot delete an old checkpoint: %s: %s", error.filename, error.strerror)

    def _on_rank_0(self, action: Callable[[], None], folder: Path) -> None:
        self._on_all_ranks(action if self.engine.topology.rank == 0 else lambda: None, folder)

    def _on_all_ranks(self, action: Callable[[], T], folder: Path) -> list[T | None]:
        """Return the action's result on each rank. Raise on all if one cannot write: they would wait for it forever."""
        failure = result = None
        try:
            result = action()
        except OSError as error:
            failure = f"cannot write into checkpoint.directory: {error.filename or folder}: {error.strerror or error}"
        answers = all_gather_objects((failure, result), self._groups.all)
        for rank, (rank_failure, _) in enumerate(answers):
            if rank_failure:
                raise _WriteError(rank_failure if rank == 0 else f"rank {rank} {rank_failure}")
        return [result for _, result in answers]


def _warn(text: str, *values: object) -> None:
    logger.warning(text, *values, extra={"event": "note"})
