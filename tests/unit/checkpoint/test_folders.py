"""Which checkpoint is the one to start from, and which go, also when a run is killed while it saves."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.checkpoint import writer
from mtp_dist.checkpoint.find import candidates, finished_checkpoints, first_valid
from mtp_dist.checkpoint.format import checkpoint_path
from mtp_dist.checkpoint.manifest import check_fully
from mtp_dist.checkpoint.retention import expired_checkpoints, prune_checkpoints
from mtp_dist.checkpoint.writer import create_staging_dir, publish
from mtp_dist.errors import ConfigError
from tests.unit.checkpoint.folders import config_in, copied, write_checkpoint, write_unfinished


def names_of(paths: list[Path]) -> list[int]:
    return [int(path.name[5:13]) for path in paths]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    others = (
        "step_00000200.unfinished",
        "step_00000030.deleted",
        "step_of_mine",
        "earlier-1",
        "step_00000010.replaced",
    )
    for name in ("step_00000009", "step_00000010", "step_00000100", *others):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000300").touch()
    return tmp_path


def test_the_one_that_latest_names_comes_first(directory: Path) -> None:
    warnings: list[str] = []
    assert names_of(candidates(directory, warnings.append)) == [100, 10, 9]
    (directory / "latest").write_text("step_00000100\n")
    assert names_of(candidates(directory, warnings.append)) == [100, 10, 9]
    assert warnings == []
    (directory / "latest").write_text("step_00000010\n")
    assert names_of(candidates(directory, warnings.append)) == [10, 9], "later ones are not older than it"
    assert warnings == [
        f"{directory / 'latest'} names step_00000010: step_00000100 and whatever else came after it is not used"
    ]


@pytest.mark.parametrize("content", [b"", b"step_00000", b"step_00000011\n", b"step_00000300\n", b"\xff\xfe", None])
def test_a_damaged_latest_is_told(directory: Path, content: bytes | None) -> None:
    latest = directory / "latest"
    latest.mkdir() if content is None else latest.write_bytes(content)
    warnings: list[str] = []
    assert names_of(candidates(directory, warnings.append)) == [100, 10, 9]
    assert len(warnings) == 1 and warnings[0].startswith(f"{latest} names ") and "is not there" in warnings[0]


def test_latest_without_a_checkpoint_is_no_new_start(tmp_path: Path) -> None:
    assert candidates(tmp_path, print) == candidates(tmp_path / "missing", print) == []
    (tmp_path / "latest").write_text("step_00000010\n")
    with pytest.raises(ConfigError, match=r"names 'step_00000010', but no checkpoint is in .*resume=none$"):
        candidates(tmp_path, print)


def test_one_that_is_being_replaced_counts_until_the_new_one_is_there(directory: Path) -> None:
    (directory / "step_00000010").rename(directory / "gone")
    assert finished_checkpoints(directory)[10].name == "step_00000010.replaced"
    (directory / "latest").write_text("step_00000010\n")
    assert names_of(candidates(directory, lambda text: None)) == [10, 9]
    create_staging_dir(directory / "step_00000010.unfinished")
    assert (directory / "step_00000010").is_dir(), "it has its name again"
    left = {path.name for path in directory.iterdir()}
    assert not {name for name in left if name.endswith((".deleted", ".replaced"))}
    assert [name for name in left if name.endswith(".unfinished")] == ["step_00000010.unfinished"]


@given(st.sets(st.integers(0, 40)), st.integers(1, 40), st.integers(1, 5), st.none() | st.integers(1, 10))
def test_what_is_kept(steps: set[int], newest: int, keep_last: int, keep_every: int | None) -> None:
    steps |= {newest}
    gone = set(expired_checkpoints(steps, newest, keep_last, keep_every))
    kept = steps - gone
    assert {0} & steps <= kept and newest in kept
    assert {step for step in steps if step > newest} <= kept, "of another future"
    last = sorted(step for step in steps if 0 < step <= newest)[-keep_last:]
    assert set(last) <= kept
    further = {step for step in kept if 0 < step <= newest} - set(last)
    assert further == {step for step in steps if 0 < step <= newest and keep_every and step % keep_every == 0} - {*last}
    assert expired_checkpoints(steps, newest, None, None) == []


def test_surplus_ones_are_deleted(directory: Path) -> None:
    before = {path.name for path in directory.iterdir()}
    shutil.rmtree(directory / "step_00000030.deleted")
    (directory / "step_00000300.of_mine").mkdir()
    prune_checkpoints(directory, 100, 1, 9)
    after = {path.name for path in directory.iterdir()}
    assert before - after == {"step_00000010", "step_00000030.deleted"}
    assert after - before == {"step_00000300.of_mine"}


class Killed(BaseException):
    """The process is no more."""


@contextmanager
def killed_at(number: int) -> Iterator[Callable[[], int]]:
    """Raises at the operation of that number that changes names or deletes; yields how many there were."""
    done = 0

    def counted(operation: Callable[..., object], half: Callable[..., object] | None = None) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            nonlocal done
            done += 1
            if done == number:
                if half:
                    half(*arguments)
                raise Killed
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
        write = writer.write_durably
        patch.setattr(writer, "write_durably", counted(write, lambda path, text: path.write_text(text[:5])))
        yield lambda: done


@pytest.mark.parametrize(("step", "keep_last"), [(30, None), (30, 1), (20, None), (20, 1)])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, step: int, keep_last: int | None) -> None:
    """Steps 10 and 20 are there; a run that was at 10 or at 20 saves 20 again, or 30."""
    write_checkpoint(tmp_path / "start", 10)
    write_checkpoint(tmp_path / "start", 20)
    config = config_in(tmp_path / "run")
    final = checkpoint_path(config, step)

    def save() -> None:
        publish(write_unfinished(config, step), final)
        prune_checkpoints(config.checkpoint_dir, step, keep_last, None)

    for number in range(1, 100):
        copied(tmp_path / "start", config.checkpoint_dir)
        with killed_at(number) as operations:
            try:
                save()
                break
            except Killed:
                pass
        found = candidates(config.checkpoint_dir, lambda text: None)
        assert first_valid(found, check_fully) == found[0], number
        assert names_of(found)[0] in (20, step)
        for finished in finished_checkpoints(config.checkpoint_dir).values():
            check_fully(finished)
        save()
        kept = [step] if keep_last else sorted({10, 20, step})
        names = sorted(path.name for path in config.checkpoint_dir.iterdir())
        assert names == ["latest", *(f"step_{of_step:08d}" for of_step in kept)], number
        assert (config.checkpoint_dir / "latest").read_text() == f"{final.name}\n"
        check_fully(final)
    assert operations() >= 5 and number == operations() + 1


def test_files_that_stay_when_their_folder_is_deleted_stop_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a deleted file that some process still has open, under a name such as .nfs0001."""
    rmtree = shutil.rmtree

    def delete_all_but_one(folder: Path, ignore_errors: bool = False) -> None:
        rmtree(folder)
        folder.mkdir()
        (folder / ".nfs0001").touch()
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))

    monkeypatch.setattr(shutil, "rmtree", delete_all_but_one)
    config = config_in(tmp_path)
    for step in (10, 10, 20, 10, 20, 20):
        write_unfinished(config, step)  # and ended before it was finished
        final = checkpoint_path(config, step)
        publish(write_unfinished(config, step), final)
        check_fully(final)
        assert not list(final.glob(".nfs*"))
        assert (tmp_path / "latest").read_text() == f"{final.name}\n"
    for step in (30, 40):
        publish(write_unfinished(config, step), checkpoint_path(config, step))
        with suppress(OSError):  # which the run reports
            prune_checkpoints(tmp_path, step, 1, None)
    monkeypatch.undo()
    final = checkpoint_path(config, 50)
    publish(write_unfinished(config, 50), final)
    prune_checkpoints(tmp_path, 50, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000050"]
