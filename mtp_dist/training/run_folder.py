"""The files of a run in its folder, and their archiving before another run uses it."""

import logging
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

from mtp_dist.checkpoint.format import CHECKPOINT_FILES
from mtp_dist.config import Config
from mtp_dist.distributed.flight_recorder import FLIGHT_RECORDER
from mtp_dist.monitoring.events import EVENTS
from mtp_dist.monitoring.profiling import PROFILE, PROFILE_FILES
from mtp_dist.monitoring.rank0 import RUN
from mtp_dist.monitoring.rank_logs import EARLIER, LOG_FILES, LOGS
from mtp_dist.monitoring.writers.wandb import WANDB_FOLDER, wandb_files

logger = logging.getLogger(__name__)

PREFLIGHT = "preflight.json"
FILES = ("metrics.jsonl", EVENTS, RUN, "summary.json", "evaluations.jsonl", PREFLIGHT)
FOLDERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("events.out.tfevents.*", "evaluation"),
    "checkpoints": CHECKPOINT_FILES,
    PROFILE: PROFILE_FILES,
    FLIGHT_RECORDER: ("rank_[0-9]*",),
    LOGS: LOG_FILES,
}
"""Folders that a run makes in its own, with patterns of the files it writes there."""

EARLIER_PREFIX = "earlier-"
"""Prefix of the folders that the files of earlier runs are moved into."""


def archive_earlier_run(config: Config) -> None:
    """Move the files of an earlier run into `earlier-1`, `earlier-2`, ... so that neither curves nor checkpoints mix.

    Keep a folder of the run that is a link or a mount point, as other programs may use it too: move only the files
    in it that a run writes, within that folder.
    """
    output_dir = config.output_dir
    moved = {output_dir / name: name for name in FILES}
    for name, patterns in (FOLDERS | {WANDB_FOLDER: wandb_files(output_dir / WANDB_FOLDER)}).items():
        folder = output_dir / name
        # This run uses `logs/` itself if it has rank logs.
        content = folder / EARLIER if name == LOGS and config.log.rank_logs else folder
        if folder.is_symlink() or folder.is_mount():
            _archive(folder, _matching(content, patterns))
        else:
            moved[content] = name
    _archive(output_dir, moved)
    _archive(config.checkpoint_dir, _matching(config.checkpoint_dir, CHECKPOINT_FILES))


def _matching(folder: Path, patterns: Iterable[str]) -> dict[Path, str]:
    return {path: path.name for pattern in patterns for path in sorted(folder.glob(pattern))}


def _archive(folder: Path, archived_names: Mapping[Path, str]) -> None:
    """Move those paths that exist into a new folder in `folder`, under the names given for them."""
    existing = [path for path in archived_names if path.exists()]
    if not existing:
        return
    archive = next(path for number in count(1) if not (path := folder / f"{EARLIER_PREFIX}{number}").exists())
    archive.mkdir()
    for path in existing:
        path.rename(archive / archived_names[path])
    logger.info("%s contains an earlier run: its files are now in %s", folder, archive)
