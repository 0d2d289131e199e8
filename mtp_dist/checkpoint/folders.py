"""The folder that checkpoints are in: which are there, how one gets its name, and which go.

A checkpoint is written as `step_00000010.unfinished`; the text file `latest` names the last one that was finished. One
of the same step waits as `.replaced` until the new one has its name, and counts until then; `.deleted` is what a
checkpoint is called while its files are removed.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

from mtp_dist.checkpoint.format import METADATA_FILE
from mtp_dist.checkpoint.manifest import MANIFEST
from mtp_dist.config import Config
from mtp_dist.errors import ConfigError
from mtp_dist.fs import sync, write_durably

LATEST = "latest"
UNFINISHED, REPLACED, DELETED = ".unfinished", ".replaced", ".deleted"
CHECKPOINT_FILES = (f"step_{'[0-9]' * 8}*", LATEST, f"{LATEST}{UNFINISHED}")
"""Patterns of everything that this program writes into the folder."""
_FINISHED = re.compile(r"step_(\d{8,})(\.replaced)?")


def checkpoint_path(config: Config, step: int) -> Path:
    return config.checkpoint_dir / f"step_{step:08d}"


def with_suffix_appended(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def is_checkpoint(path: Path) -> bool:
    """Whether the path is meant to be a checkpoint, maybe a damaged one, and not a folder of them."""
    named = _FINISHED.fullmatch(path.name) and path.is_dir()
    return bool(named) or any((path / name).exists() for name in (METADATA_FILE, MANIFEST))


def checkpoint_directory(path: Path) -> Path:
    """Return a run's folder of checkpoints for the run's folder, and any other path as it is."""
    below = path / "checkpoints"
    return below if below.is_dir() and not finished_checkpoints(path) else path


def finished_checkpoints(directory: Path) -> dict[int, Path]:
    """By step, the highest first."""
    found: dict[int, Path] = {}
    for path in sorted(directory.glob("step_*")):  # `step_00000010` before `step_00000010.replaced`
        if (match := _FINISHED.fullmatch(path.name)) and path.is_dir():
            found.setdefault(int(match[1]), path)
    return dict(sorted(found.items(), reverse=True))


def latest_name(directory: Path) -> str | None:
    """What `latest` says, nothing where it cannot be read; None where it is missing."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return ""


def candidates(directory: Path, warn: Callable[[str], None]) -> list[Path]:
    """The checkpoints to start from, best first: the one that `latest` names, then those of lower steps.

    Raises ConfigError where `latest` names one and there is none at all.
    """
    found, latest, name = finished_checkpoints(directory), directory / LATEST, latest_name(directory)
    if name is None:
        return list(found.values())
    if not found:
        raise ConfigError(
            f"{latest} names {name!r}, but no checkpoint is in {directory}: bring it back, or start anew with "
            "checkpoint.resume=none"
        )
    step = next((step for step, path in found.items() if path.name.removesuffix(REPLACED) == name), None)
    if step is None:
        warn(f"{latest} names {name!r}, which is not there: taking the highest step")
        return list(found.values())
    if max(found) > step:
        warn(f"{latest} names {name}: {found[max(found)].name} and whatever else came after it is not used")
    return [path for of_step, path in found.items() if of_step <= step]


def create_staging_dir(unfinished: Path) -> None:
    """An empty folder to write into, after clearing away what a killed or failed save has left. Raises OSError."""
    directory = unfinished.parent
    for replaced in directory.glob(f"step_*{REPLACED}"):
        if not (finished := replaced.with_name(replaced.name.removesuffix(REPLACED))).exists():
            replaced.rename(finished)
    for ending in (UNFINISHED, REPLACED, DELETED):
        for left in directory.glob(f"step_*{ending}"):
            # Files may stay: NFS keeps one that some process still has open. The next save tries again.
            with suppress(OSError):
                _delete(left)
    unfinished.mkdir(parents=True)


def publish(unfinished: Path, final: Path) -> None:
    """Give a checkpoint that is on the disk its name. At every moment an older one or this one can be started from."""
    replaced = with_suffix_appended(final, REPLACED)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    sync(final.parent)
    named = final.with_name(f"{LATEST}{UNFINISHED}")
    write_durably(named, f"{final.name}\n")
    named.replace(final.with_name(LATEST))
    sync(final.parent)
    if replaced.exists():
        with suppress(OSError):  # the checkpoint is there; the next save tries again
            _delete(replaced)


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
        _delete(found[step])


def _delete(folder: Path) -> None:
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
