"""Which checkpoints go, and how."""

import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from mtp_dist.checkpoint.find import finished_checkpoints
from mtp_dist.checkpoint.format import DELETED, REPLACED, UNFINISHED


def expired_checkpoints(steps: Iterable[int], newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """The steps whose checkpoints may go once that of `newest` is there.

    Later ones than the newest are of an abandoned future and do not count; step 0 is an imported model.
    """
    if keep_last is None:
        return []
    older = sorted(step for step in steps if 0 < step < newest)
    last = older[max(0, len(older) - keep_last + 1) :]
    return [step for step in older if step not in last and not (keep_every and step % keep_every == 0)]


def prune_checkpoints(directory: Path, newest: int, keep_last: int | None, keep_every: int | None) -> None:
    """Delete what `surplus` names, if the newest is there. Raise OSError if something of it stays."""
    found = finished_checkpoints(directory)
    if newest not in found:  # yet: on a network file system the list of a folder may be older than its folders
        return
    for step in expired_checkpoints(found, newest, keep_last, keep_every):
        delete_folder(found[step])


def delete_folder(folder: Path) -> None:
    """Raise OSError if something of it stays, under a name that nothing else needs."""
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
