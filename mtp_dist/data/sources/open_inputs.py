"""Choice of the class that reads an input, from its name and options."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mtp_dist.config.synthetic import SYNTHETIC_PREFIX
from mtp_dist.data.sources.dataset_input import DatasetInput
from mtp_dist.data.sources.files_input import FilesInput
from mtp_dist.data.sources.folders import files_below
from mtp_dist.data.sources.hub import check_dataset_name
from mtp_dist.data.sources.input import Input, InputOptions
from mtp_dist.data.sources.python_stdlib import PYTHON_STDLIB, stdlib_files
from mtp_dist.data.sources.synthetic_input import SyntheticInput
from mtp_dist.data.splits import Split, in_validation_split
from mtp_dist.errors import ConfigError


def open_inputs(names: Sequence[str], options: InputOptions) -> list[Input]:
    """Open inputs. Raise UserError if one is missing or unreadable, or if an option does not fit."""
    if options.glob is not None and not any(Path(name).is_dir() for name in names):
        raise ConfigError(f"{options.option('glob')} {options.glob!r} selects files of a folder: remove it")
    return [_open_input(name, options) for name in names]


def _open_input(name: str, options: InputOptions) -> Input:
    path = Path(name)
    if name == PYTHON_STDLIB:
        return FilesInput(stdlib_files(_hashed_split(options)), options.fields, Counter())
    if name.startswith(SYNTHETIC_PREFIX) and not path.exists():
        return SyntheticInput(name, options)
    if path.is_dir() and not _is_saved_dataset(path):
        return _files_of_folder(path, options)
    if path.exists() and not path.is_dir():
        if options.split:
            raise ConfigError(
                f"{options.option('split')} = '{options.split}' selects a part of a dataset or folder, '{name}' is one "
                "file: remove it"
            )
        return FilesInput([path], options.fields)
    in_local_folder = path.parent != Path() and path.parent.is_dir()
    if not path.is_dir():
        check_dataset_name("" if in_local_folder else name, options.label(name))
    return DatasetInput(name, options)


def _hashed_split(options: InputOptions) -> Split:
    split = options.split or "all"
    if split not in ("all", "train", "validation"):
        raise ConfigError(f"{options.option('split')} = '{split}' is unknown for files: use 'train' or 'validation'")
    return cast(Split, split)


def _is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` of the datasets library wrote it."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _files_of_folder(folder: Path, options: InputOptions) -> FilesInput:
    """Return the files sorted by POSIX relative path."""
    if options.glob is None:
        raise ConfigError(
            f"{options.label(folder)} is a folder: select its files with {options.option('glob')}, such as '**/*.py'"
        )
    try:
        files, skipped = files_below(folder, options.glob)
    except ValueError as error:
        raise ConfigError(f"{options.option('glob')} {options.glob!r} is not a valid pattern: {error}") from None
    split = _hashed_split(options)
    chosen = [
        file
        for name, file in sorted(files.items())
        if split == "all" or in_validation_split(name) == (split == "validation")
    ]
    if not chosen:
        raise ConfigError(
            f"{options.label(folder)} has no file for {options.option('glob')} {options.glob!r} and "
            f"{options.option('split')} '{split}': choose others"
        )
    return FilesInput(chosen, options.fields, skipped)
