"""Saves of a model in training on two ranks: in the background, on a full disk, with a bug, and starts from them."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mtp_dist.checkpoint import find, restore, saver
from mtp_dist.checkpoint.format import RunState
from mtp_dist.checkpoint.manifest import check_fully, read_manifest, tensor_files
from mtp_dist.checkpoint.reader import load_weights
from mtp_dist.checkpoint.restore import agree_on_resume_point
from mtp_dist.checkpoint.save import TensorFile
from mtp_dist.checkpoint.saver import CheckpointSaver
from mtp_dist.config import Config
from mtp_dist.distributed.device import select_device
from mtp_dist.distributed.topology import initialize_topology, new_gloo_groups
from mtp_dist.engine.engine import TrainingEngine
from mtp_dist.errors import UserError
from tests.engines import open_engine, take_step
from tests.parity.resuming import PIPELINE, TENSOR, at
from tests.ranks import Ranks
from tests.tiny import tiny_config
from tests.unit.checkpoint.folders import DAMAGES, flip


def saver_into(directory: Path, engine: TrainingEngine, **changes: object) -> CheckpointSaver:
    checkpoint = engine.config.checkpoint.model_copy(update={"directory": str(directory)} | changes)
    config = engine.config.model_copy(update={"checkpoint": checkpoint})
    return CheckpointSaver(config, engine, new_gloo_groups(engine.topology))


def save_in_background(config: Config, directory: Path) -> tuple[bool, bool, bool]:
    """Save step 1 into `waited`, and steps 1, 2 and the last into `async`.

    Return whether step 1 was complete while training went on and when the next save started, and whether the last step
    was when its save returned.
    """
    engine, release = open_engine(config), threading.Event()
    take_step(engine, 1)
    waited = saver_into(directory / "waited", engine)
    waited.save(RunState(1))
    waited.wait()

    background = saver_into(directory / "async", engine)
    first = directory / "async" / "step_00000001"
    write_tensor_files = saver.write_tensor_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "write_tensor_files", lambda *files: release.wait(60) and write_tensor_files(*files))
        background.save(RunState(1))
        take_step(engine, 2)
        meanwhile = first.exists()
        timer = threading.Timer(0.3, release.set)
        timer.start()
        background.save(RunState(2))
        next_save = first.exists()
        timer.join()
    background.wait()
    take_step(engine, 3)
    background.save(RunState(config.train.steps), last=True)
    return meanwhile, next_save, (directory / "async" / f"step_{config.train.steps:08d}").exists()


def save_on_full_disk(config: Config, directory: Path) -> tuple[list[str], list[str], list[str]]:
    """Fill rank 1's disk for two attempts of step 2, for all of step 3 and for all of the last step. Keep two.

    Return the messages, the errors, and the names in the folder after the first save that failed for good.
    """
    engine, messages, errors, kept = open_engine(config), [], [], []
    saver_of_run = saver_into(directory, engine, keep_last=2)
    write_tensor_files, failing = saver.write_tensor_files, 0

    def write(folder: Path, *arguments: Any) -> dict[str, TensorFile]:
        nonlocal failing
        written = write_tensor_files(folder, *arguments)
        failing -= 1
        if failing >= 0 and dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder / next(iter(written)))
        return written

    saver.logger.setLevel("INFO")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver.logger, "handle", lambda record: messages.append(record.getMessage()))
        patch.setattr(saver, "sleep", lambda delay: None)
        patch.setattr(saver, "write_tensor_files", write)
        for step, failing in {1: 0, 2: 2, 3: 99, 4: 0, config.train.steps: 99}.items():  # noqa: B007
            take_step(engine, step)
            try:
                saver_of_run.save(RunState(step))
                saver_of_run.wait()
            except UserError as error:
                errors.append(str(error))
            if step == 3:
                kept = sorted(path.name for path in directory.iterdir())
            dist.barrier()
    return messages, errors, kept


def save_with_bug(config: Config, directory: Path) -> None:
    """Check that the save after one whose thread has raised raises the same."""
    broken = saver_into(directory, open_engine(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "write_tensor_files", lambda *_: [][0])
        broken.save(RunState(1))
        with pytest.raises(IndexError, match="list index out of range"):
            broken.save(RunState(2))


def agree(config: Config, is_shared: bool = True) -> tuple[str, list[str]]:
    """Return the checkpoint that the ranks agree on, or the error, and the messages."""
    topology = initialize_topology(config, select_device(config))
    group, messages = new_gloo_groups(topology).all, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find.logger, "handle", lambda record: messages.append(record.getMessage()))
        if not is_shared:
            patch.setattr(restore, "CHECK_INTERVAL_S", 0.0)
            patch.setattr(Path, "is_dir", lambda _: topology.rank == 0)
        try:
            point = agree_on_resume_point(config, topology, group)
            return point.folder.name if point else "from scratch", messages
        except UserError as error:
            return f"{type(error).__name__}: {error}", messages


STEPS = tiny_config().train.steps


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[bool, ...]]]:
    directory = tmp_path_factory.mktemp("saver")
    return directory, ranks.run(2, save_in_background, at(PIPELINE, directory), directory)


def test_training_continues_while_a_checkpoint_is_written(saved: tuple[Path, list[tuple[bool, ...]]]) -> None:
    directory, finished = saved
    assert finished == [(False, True, True)] * 2
    names = ("waited/step_00000001", "async/step_00000001", "async/step_00000002")
    waited, meanwhile, later = (directory / name for name in names)
    records = read_manifest(waited)
    assert len(records) == 7
    for name in records.keys() - {"config.json"}:
        assert (waited / name).read_bytes() == (meanwhile / name).read_bytes(), f"{name} is of the time of the save"
    for name in tensor_files(records):
        assert (waited / name).read_bytes() != (later / name).read_bytes(), "training changes every file"


def test_failed_writes_are_logged_and_tried_again(ranks: Ranks, tmp_path: Path) -> None:
    (messages, *first), (_, *second) = ranks.run(2, save_on_full_disk, at(PIPELINE, tmp_path), tmp_path)

    def failure(step: int) -> str:
        file = tmp_path / f"step_{step:08d}.unfinished" / "model-00002-of-00002.safetensors"
        return f"rank 1 cannot write into checkpoint.directory: {file}: "

    assert [message.split(":")[0] for message in messages] == [
        "Saved the checkpoint of step 1",
        *["checkpoint of step 2"] * 2,
        "Saved the checkpoint of step 2",
        *["checkpoint of step 3"] * 3,
        "checkpoint of step 3 is NOT saved",
        "Saved the checkpoint of step 4",
        *[f"checkpoint of step {STEPS}"] * 3,
        f"checkpoint of step {STEPS} is NOT saved",
    ]
    assert all("No space left on device" in message for message in messages if not message.startswith("Saved"))
    assert failure(2) in messages[1] and messages[1].endswith("; trying again in 2 s") and "in 10 s" in messages[2]
    for errors, _ in (first, second):
        assert all(error.startswith(failure(step)) for error, step in zip(errors, (3, STEPS), strict=True))
    assert first[1] == ["latest", "step_00000001", "step_00000002"], "none is deleted before the next one exists"
    assert (tmp_path / "latest").read_text() == "step_00000004\n"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000004"]
    for step in (2, 4):
        check_fully(tmp_path / f"step_{step:08d}")
    before, after = (load_weights(tmp_path / f"step_{step:08d}")[1] for step in (2, 4))
    assert not torch.equal(before["embedding.weight"], after["embedding.weight"]), "training has continued"


def test_bug_in_the_thread_ends_the_run(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, save_with_bug, at(PIPELINE, tmp_path), tmp_path)


def test_damaged_files_are_never_loaded(ranks: Ranks, saved: tuple[Path, list[tuple[bool, ...]]]) -> None:
    folder = saved[0] / "async"
    newest = folder / f"step_{STEPS:08d}"
    config = at(TENSOR, folder)

    def start(is_shared: bool = True) -> tuple[str, list[str]]:
        (result, messages), (other, _) = ranks.run(2, agree, config, is_shared)
        assert result == other
        return result, messages

    assert start() == (newest.name, [])
    error = f"LaunchError: rank 0 would start from {newest}, which rank 1 cannot find: checkpoint.directory must be "
    assert start(is_shared=False)[0].startswith(error)
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        DAMAGES["middle byte"](path)
        result, [message] = start()
        assert result == "step_00000002" and message.startswith(f"{newest} is ") and message.endswith(result), path
        assert path.name in message or path.name == "manifest.json"
        path.write_bytes(content)
    for path in folder.glob("step_*/optimizer-00002-of-00002.safetensors"):
        flip(path, -1)
    result, messages = start()
    assert result.startswith("CheckpointError: ") and "no older checkpoint is left" in result and len(messages) == 2
