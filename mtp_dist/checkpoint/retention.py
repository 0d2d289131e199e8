"""Deletion of expired checkpoints and of the leftovers of killed or failed saves."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

from mtp_dist.checkpoint.find import finished_checkpoints
from mtp_dist.checkpoint.format import DELETED, REPLACED, UNFINISHED


def expired_checkpoints(steps: Iterable[int], newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Return the steps whose checkpoints may be deleted once that of `newest` exists.

    Steps after it, which a rollback has abandoned, and step 0, an imported model, are neither counted nor deleted.
    """
    if keep_last is None:
        return []
    older = sorted(step for step in steps if 0 < step < newest)
    last = older[max(0, len(older) - keep_last + 1) :]
    return [step for step in older if step not in last and not (keep_every and step % keep_every == 0)]


def prune_checkpoints(directory: Path, newest: int, keep_last: int | None, keep_every: int | None) -> None:
    """Delete the expired checkpoints if that of `newest` exists. Raise OSError if a part of one remains."""
    found = finished_checkpoints(directory)
    if newest not in found:  # yet: a network file system may list a folder as it was some seconds ago
        return
    for step in expired_checkpoints(found, newest, keep_last, keep_every):
        delete_checkpoint(found[step])


def remove_leftovers(directory: Path) -> None:
    """Delete leftovers of killed or failed saves, after renaming a replaced checkpoint back. Raise OSError."""
    for replaced in directory.glob(f"step_*{REPLACED}"):
        if not (finished := replaced.with_name(replaced.name.removesuffix(REPLACED))).exists():
            replaced.rename(finished)
    for suffix in (UNFINISHED, REPLACED, DELETED):
        for path in directory.glob(f"step_*{suffix}"):
            # Files may remain: NFS keeps one that some process still has open. The next save tries again.
            with suppress(OSError):
                delete_checkpoint(path)


def delete_checkpoint(folder: Path) -> None:
    """Delete a folder. Raise OSError if a part of it remains, under a name that nothing else needs."""
    if not folder.name.endswith(DELETED):
        # Renamed first: what a kill leaves of it must not look like a checkpoint.
        name = folder.name.removesuffix(UNFINISHED).removesuffix(REPLACED)
        free = (folder.with_name(f"{name}.{number}{DELETED}") for number in count(1))
        deleted = next(path for path in free if not path.exists())
        folder.rename(deleted)
        folder = deleted
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
