"""Which files a source consists of, and their contents."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mtp_dist.config import Config, ConfigError, SourceConfig

PYTHON_STDLIB = "python-stdlib"
VALIDATION_SHARE = 0.05

# Tests are more than half of the standard library where they are installed, and Debian does not install them; codec
# tables and pydoc's help texts are generated. The rest is the code that people wrote, nearly the same on every machine.
STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


def in_validation_split(relative_path: str) -> bool:
    """Whether a file belongs to `validation`; depends on nothing but its POSIX path relative to the source."""
    digest = hashlib.sha256(relative_path.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def _python_files(root: Path, skipped_folders: frozenset[str]) -> list[Path]:
    """Every .py file below root, sorted by POSIX relative path. Links to folders are not followed."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped_folders]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def select_files(source: SourceConfig, key: str = "data") -> list[Path]:
    """The files of the source's split in a fixed order, at least one.

    `key` is the source's place in the configuration, such as `data.train.0`. Raises ConfigError, naming it, where the
    path is missing or unreadable, where a single file is to be split, and where no file is left.
    """
    is_stdlib = source.path == PYTHON_STDLIB
    root = Path(sysconfig.get_paths()["stdlib"] if is_stdlib else source.path)
    named = f"{key}.path = {source.path!r}"
    if not root.exists():
        raise ConfigError(f"{named} does not exist: give a folder of .py files, a file, or '{PYTHON_STDLIB}'")
    if not os.access(root, os.R_OK):
        raise ConfigError(f"{named} cannot be read: change its permissions or give another path")
    if not root.is_dir():
        if source.split != "all":
            raise ConfigError(
                f"{key}.split = {source.split!r} cannot split {source.path!r}, which is one file: "
                "use 'all', or give a folder"
            )
        return [root]
    files = _python_files(root, STDLIB_SKIPPED_FOLDERS if is_stdlib else frozenset())
    if not files:
        raise ConfigError(f"{named} has no .py file: give a folder that has some, or a single file")
    if source.split == "all":
        return files
    wanted = source.split == "validation"
    selected = [file for file in files if in_validation_split(file.relative_to(root).as_posix()) == wanted]
    if not selected:
        raise ConfigError(
            f"{key}.split = {source.split!r} leaves none of the {len(files)} files of {source.path!r}: "
            "use 'all', or give a folder with more files"
        )
    return selected


def read_documents(source: SourceConfig, key: str = "data") -> list[bytes]:
    """The contents of the source's files in a fixed order, empty files left out, at least one.

    Raises ConfigError, naming `key`, like `select_files`, and where a file cannot be read or all of them are empty.
    """
    documents = []
    for file in select_files(source, key):
        try:
            documents.append(file.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{key}.path = {source.path!r}: cannot read {file} ({error.strerror}): change its permissions or "
                "give another path"
            ) from None
    documents = [document for document in documents if document]
    if not documents:
        raise ConfigError(f"{key}.path = {source.path!r} has only empty files: give a source with text")
    return documents


def configured_sources(config: Config) -> Iterator[tuple[str, SourceConfig]]:
    """Every source with its key, such as `data.train.0`; the training sources first."""
    for section, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for index, source in enumerate(sources):
            yield f"data.{section}.{index}", source


def check_sources(config: Config) -> None:
    """Raise ConfigError where a source has nothing to read; lists folders, opens no file."""
    for key, source in configured_sources(config):
        select_files(source, key)
