"""Writing a folder of safetensors files with its index, under a staging name until it is complete and on the disk."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_dist.checkpoint.format import (
    LATEST,
    MODEL,
    REPLACED,
    UNFINISHED,
    index_file,
    tensor_file,
)
from mtp_dist.checkpoint.manifest import ProgressCallback
from mtp_dist.checkpoint.retention import delete_checkpoint, remove_leftovers
from mtp_dist.errors import CheckpointError
from mtp_dist.fs import add_suffix, sync, write_durably

FILE_BYTES = 2 * 2**30
"""Size limit of a file of weights, in bytes; a single larger weight has a file of its own."""
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Names of the types in safetensors headers."""


@contextmanager
def new_folder(target: Path, option: str = "--to") -> Iterator[Path]:
    """Yield a staging directory that is renamed to `target` at the end, when all of it is on the disk.

    option: the one that names the target. Raise CheckpointError if `target` exists or cannot be written.
    """
    if target.exists():
        raise CheckpointError(f"{option} = '{target}' exists: delete it, or name another folder")
    # Hidden: a run deletes leftovers such as step_00000010.unfinished from its folder of checkpoints.
    staging = target.with_name(f".{target.name}{UNFINISHED}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for path in (*staging.rglob("*"), staging):
            sync(path)
        staging.rename(target)
        sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {option} = '{target}': {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def create_staging_dir(staging: Path) -> None:
    """Create the empty folder of a checkpoint, after removing leftovers of earlier saves. Raise OSError."""
    remove_leftovers(staging.parent)
    staging.mkdir(parents=True)


def publish(staging: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name. At every moment an older one or this one can be opened."""
    replaced = add_suffix(final, REPLACED)
    if final.exists():
        final.rename(replaced)
    staging.rename(final)
    sync(final.parent)
    latest = final.with_name(f"{LATEST}{UNFINISHED}")
    write_durably(latest, f"{final.name}\n")
    latest.replace(final.with_name(LATEST))
    sync(final.parent)
    if replaced.exists():
        with suppress(OSError):  # the new checkpoint is complete; the next save tries again
            delete_checkpoint(replaced)


def write_index(
    folder: Path, kind: str, shapes: Mapping[str, Mapping[str, Sequence[int]]], dtype: torch.dtype = torch.float32
) -> set[str]:
    """Write the index of the files of one kind, given the tensors' shapes per file. Return the tensors' names.

    The folder is not listed: a network file system may list it as it was some seconds ago.
    """
    weight_map: dict[str, str] = {}
    size = 0
    for file, file_shapes in shapes.items():
        for name, shape in file_shapes.items():
            if name in weight_map:
                raise RuntimeError(f"{name} is saved twice: in {weight_map[name]} and in {file}")
            weight_map[name] = file
            size += dtype.itemsize * math.prod(shape)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_durably(folder / index_file(kind), json.dumps(index, indent=2))
    return set(weight_map)


def report_progress(tensors: Iterator[Tensor], total: int, on_progress: ProgressCallback) -> Iterator[Tensor]:
    """Yield the tensors. Call `on_progress` before each with its number, from 1, and the total."""
    for number in range(1, total + 1):
        on_progress(number, total)
        yield next(tensors)


def write_weights(
    folder: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensors: Iterator[Tensor]
) -> list[str]:
    """Write the next tensors into model-00001-of-00003.safetensors and so on, and their index.

    shapes: by name, in the order of the tensors. Return the names of the files.
    """
    files = _split_into_files(shapes, dtype)
    file_shapes = {tensor_file(MODEL, number, len(files)): shapes for number, shapes in enumerate(files)}
    for file, tensor_shapes in file_shapes.items():
        write_tensors(folder / file, tensor_shapes, dtype, tensors)
    write_index(folder, MODEL, file_shapes, dtype)
    return [*file_shapes, index_file(MODEL)]


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensors: Iterator[Tensor]
) -> None:
    """Write the next tensors into a safetensors file, each as soon as it is available.

    The library's own writer requires all tensors of a file at once. The format is that of
    https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = next(tensors)
            assert tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype, f"{name} matches the header"
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            del tensor  # before the next one is made


def _split_into_files(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> list[dict[str, Sequence[int]]]:
    """Return the shapes of each file, in their order; huggingface_hub's split moves large tensors out of it."""
    files: list[dict[str, Sequence[int]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = dtype.itemsize * math.prod(shape)
        if files[-1] and filled + size > FILE_BYTES:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += size
    return files
