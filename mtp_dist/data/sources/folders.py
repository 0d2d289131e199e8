"""The files of a folder that match a pattern, with one rule for links and hidden files."""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

Parts = tuple[str, ...]
"""A path relative to the folder."""


def files_below(folder: Path, pattern: str) -> tuple[dict[str, Path], Counter[str]]:
    """Return the files by POSIX relative path, and the number of skipped entries by reason.

    Linked folders are followed. Each folder is read once, under its own name if it is below `folder`. A name that
    starts with a dot matches only a part of the pattern that does too. Raise ValueError if the pattern is not relative.
    """
    segments = PurePosixPath(pattern).parts
    if not segments or segments[0] == "/" or ".." in segments:
        raise ValueError("it must be relative to the folder, such as '**/*.py'")
    files: dict[str, Path] = {}
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    folders: list[Parts] = [()]
    links: list[Parts] = []
    while folders or links:
        # Links come last: their targets may be below `folder` too, under their own names.
        parts = folders.pop() if folders else heapq.heappop(links)
        path = folder.joinpath(*parts)
        try:
            status = path.stat()
            if (identity := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(identity)
            with os.scandir(path) as entries:
                for entry in entries:
                    child = (*parts, entry.name)
                    if entry.is_symlink() and os.path.isdir(entry.path):
                        if _can_match_below(child, segments):
                            heapq.heappush(links, child)
                    elif entry.is_dir(follow_symlinks=False):
                        if _can_match_below(child, segments):
                            folders.append(child)
                    elif _matches(child, segments):
                        if os.path.isfile(entry.path):
                            files["/".join(child)] = path / entry.name
                        else:
                            skipped["broken link" if entry.is_symlink() else "not a file"] += 1
        except OSError:
            skipped["folder that cannot be read"] += 1
    return files, skipped


def _matches(parts: Parts, segments: Sequence[str]) -> bool:
    if not segments:
        return not parts
    if segments[0] == "**":
        rest = segments[1:] or ("*",)
        visible = next((i for i, part in enumerate(parts) if part.startswith(".")), len(parts))
        return any(_matches(parts[i:], rest) for i in range(visible + 1))
    return bool(parts) and _matches_one(parts[0], segments[0]) and _matches(parts[1:], segments[1:])


def _can_match_below(parts: Parts, segments: Sequence[str]) -> bool:
    """Return whether a file below this folder may match, so that other folders need not be read."""
    for part, segment in zip(parts, segments, strict=False):
        if segment == "**":
            return True
        if not _matches_one(part, segment):
            return False
    return len(parts) < len(segments)


def _matches_one(part: str, segment: str) -> bool:
    return fnmatchcase(part, segment) and (segment.startswith(".") or not part.startswith("."))
