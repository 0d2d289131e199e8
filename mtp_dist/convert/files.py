"""Writing a folder of weights: whole or not at all, one file's weights in memory at a time."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mtp_dist.checkpoint.files import MODEL, sync, tensor_file
from mtp_dist.config import ConfigError

FILE_BYTES = 2 * 2**30
"""Largest file of weights, if no single weight is larger."""

Watch = Callable[[int, int], None]
"""Called with the number of weights written and of all."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end, when everything in it is on the disk.

    Raises ConfigError where there is something of that name, or where it cannot be written.
    """
    if target.exists():
        raise ConfigError(f"--to = '{target}' exists: delete it, or name another folder")
    unfinished = target.with_name(f"{target.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        unfinished.rename(target)
        sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write --to = '{target}': {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_weights(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    bytes_each: int,
    tensors_of: Callable[[str], Mapping[str, Tensor]],
    watch: Watch,
) -> None:
    """Write what `tensors_of` makes of each weight into model-00001-of-00003.safetensors and so on, and their index.

    shapes: those of all weights by name; bytes_each: of one of their numbers.
    """
    sizes = {name: bytes_each * math.prod(shape) for name, shape in shapes.items()}
    files = _files(sizes)
    written = 0
    homes: dict[str, str] = {}
    for number, names in enumerate(files):
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= {key: tensor.contiguous() for key, tensor in tensors_of(name).items()}
            written += 1
            watch(written, len(sizes))
        file = tensor_file(MODEL, number, len(files))
        save_file(tensors, folder / file, {"format": "pt"})
        homes |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": homes}
    (folder / f"{MODEL}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _files(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names of the weights of each file."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files
