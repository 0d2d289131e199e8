"""Writing a folder of weights: whole or not at all, one tensor in memory at a time."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mtp_dist.checkpoint.format import (
    DELETED,
    LATEST,
    MODEL,
    REPLACED,
    UNFINISHED,
    index_file,
    tensor_file,
    with_suffix_appended,
)
from mtp_dist.checkpoint.retention import delete_folder
from mtp_dist.errors import ConfigError
from mtp_dist.fs import sync, write_durably

FILE_BYTES = 2 * 2**30
"""Largest file of weights, if no single weight is larger."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""In safetensors."""

ProgressCallback = Callable[[int, int], None]
"""Called before each tensor with its number, from 1, and that of all."""


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
    except OSError as error:
        raise ConfigError(f"cannot write --to = '{target}': {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def with_progress(tensors: Iterator[Tensor], total: int, watch: ProgressCallback) -> Iterator[Tensor]:
    for number in range(1, total + 1):
        watch(number, total)
        yield next(tensors)


def write_weights(
    folder: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensors: Iterator[Tensor]
) -> list[str]:
    """Write the next tensors into model-00001-of-00003.safetensors and so on, and their index.

    shapes: by name, in the order of the tensors.
    """
    sizes = {name: dtype.itemsize * math.prod(shape) for name, shape in shapes.items()}
    files = _files(sizes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = tensor_file(MODEL, number, len(files))
        write_tensors(folder / file, {name: shapes[name] for name in names}, dtype, tensors)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / index_file(MODEL)).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [*dict.fromkeys(weight_map.values()), index_file(MODEL)]


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensors: Iterator[Tensor]
) -> None:
    """Write a safetensors file of the next tensors, each as soon as it is there.

    The library's own writer takes all of a file's tensors at once. The format is that of
    https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            _append(file, next(tensors), name, shape, dtype)


def _append(file: BinaryIO, tensor: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    assert tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype, f"{name} is what the header says"
    file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _files(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names of each file, in their order; huggingface_hub's split takes those larger than a file out of it."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def write_index(folder: Path, kind: str, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> set[str]:
    """Write which file has which tensor, given the tensors' shapes by file. Return the tensors' names.

    The files are not looked at: on a network file system the list of a folder may be older than its files.
    """
    weight_map: dict[str, str] = {}
    size = 0
    for file, of_file in shapes.items():
        for name, shape in of_file.items():
            if name in weight_map:
                raise RuntimeError(f"{name} is saved twice: in {weight_map[name]} and in {file}")
            weight_map[name] = file
            size += 4 * math.prod(shape)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_durably(folder / index_file(kind), json.dumps(index, indent=2))
    return set(weight_map)


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
                delete_folder(left)
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
            delete_folder(replaced)
