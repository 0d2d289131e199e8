"""A save that is killed or fails at any moment leaves a valid checkpoint; expired ones are deleted."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.checkpoint import writer
from mtp_dist.checkpoint.find import candidates, finished_checkpoints, first_valid, latest_name
from mtp_dist.checkpoint.manifest import check_fully
from mtp_dist.checkpoint.retention import expired_checkpoints, prune_checkpoints
from mtp_dist.checkpoint.writer import new_folder
from tests.unit.checkpoint.folders import config_in, copied, write_checkpoint, write_unfinished


@given(st.sets(st.integers(0, 40)), st.integers(1, 40), st.integers(1, 5), st.none() | st.integers(1, 10))
def test_retention(steps: set[int], newest: int, keep_last: int, keep_every: int | None) -> None:
    steps |= {newest}
    kept = steps - set(expired_checkpoints(steps, newest, keep_last, keep_every))
    assert {0} & steps <= kept and newest in kept
    assert {step for step in steps if step > newest} <= kept, "they belong to another future"
    last = set(sorted(step for step in steps if 0 < step <= newest)[-keep_last:])
    assert last <= kept
    others = {step for step in kept if 0 < step <= newest} - last
    assert others == {step for step in steps if 0 < step <= newest and keep_every and step % keep_every == 0} - last
    assert expired_checkpoints(steps, newest, None, None) == []


def test_only_expired_checkpoints_are_deleted(tmp_path: Path) -> None:
    kept = ("step_00000009", "step_00000100", "step_00000200.unfinished", "step_of_mine", "step_00000300.of_mine")
    for name in (*kept, "step_00000010"):
        (tmp_path / name).mkdir()
    prune_checkpoints(tmp_path, 100, 1, 9)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_save_of_a_run_does_not_disturb_an_import(tmp_path: Path) -> None:
    with new_folder(tmp_path / "step_00000000") as imported:
        (imported / "config.json").touch()
        write_checkpoint(tmp_path, 10)
    assert (tmp_path / "step_00000000" / "config.json").exists()


@contextmanager
def killed_at(number: int) -> Iterator[Iterator[int]]:
    """Raise KeyboardInterrupt at the operation of that number that renames or deletes. Yield their numbers."""
    numbers = count(1)

    def counted(operation: Callable[..., object], half: Callable[..., object] | None = None) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            if next(numbers) == number:
                if half:
                    half(*arguments)
                raise KeyboardInterrupt
            return operation(*arguments, **options)

        return run

    def delete_half(folder: Path, **_: object) -> None:
        for path in sorted(Path(folder).iterdir())[::2]:
            path.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", counted(os.rename))
        patch.setattr(Path, "replace", counted(os.replace))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree, delete_half))
        patch.setattr(writer, "sync", counted(writer.sync))
        patch.setattr(writer, "write_durably", counted(writer.write_durably, lambda to, text: to.write_text(text[:5])))
        yield numbers


@pytest.mark.parametrize(("step", "keep_last"), [(30, None), (30, 1), (20, None), (20, 1)])
def test_kill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path, step: int, keep_last: int | None) -> None:
    """Steps 10 and 20 are there; a run that was at 10 or at 20 saves 20 again, or 30."""
    write_checkpoint(tmp_path / "start", 10)
    write_checkpoint(tmp_path / "start", 20)
    run = tmp_path / "run"

    def save() -> Path:
        final = write_checkpoint(run, step)
        prune_checkpoints(run, step, keep_last, None)
        return final

    for number in range(1, 100):
        copied(tmp_path / "start", run)
        with killed_at(number) as operations, suppress(KeyboardInterrupt):
            save()
            break
        found = candidates(run)
        assert first_valid(found, check_fully) == found[0], number
        assert found[0].name[:13] == latest_name(run) in ("step_00000020", f"step_{step:08d}")
        for finished in finished_checkpoints(run).values():
            check_fully(finished)
        final = save()
        kept = [step] if keep_last else sorted({10, 20, step})
        names = sorted(path.name for path in run.iterdir())
        assert names == ["latest", *(f"step_{number:08d}" for number in kept)], number
        assert (run / "latest").read_text() == f"{final.name}\n"
        check_fully(final)
    assert number == next(operations) >= 6


def test_files_left_in_a_deleted_folder_do_not_stop_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps a deleted file that some process still has open, under a name such as .nfs0001."""
    rmtree = shutil.rmtree

    def delete_all_but_one(folder: Path, ignore_errors: bool = False) -> None:
        rmtree(folder)
        folder.mkdir()
        (folder / ".nfs0001").touch()
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))

    monkeypatch.setattr(shutil, "rmtree", delete_all_but_one)
    for step in (10, 10, 20, 10, 20, 20):
        write_unfinished(config_in(tmp_path), step)  # killed before it was published
        final = write_checkpoint(tmp_path, step)
        check_fully(final)
        assert not list(final.glob(".nfs*"))
        assert (tmp_path / "latest").read_text() == f"{final.name}\n"
    for step in (30, 40):
        write_checkpoint(tmp_path, step)
        with suppress(OSError):  # which the run reports
            prune_checkpoints(tmp_path, step, 1, None)
    monkeypatch.undo()
    write_checkpoint(tmp_path, 50)
    prune_checkpoints(tmp_path, 50, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000050"]
