"""`manifest.json`: the size and SHA-256 of each file, so that corruption is found before a checkpoint is loaded."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.format import MANIFEST, METADATA_FILE, MODEL, OPTIMIZER, InvalidCheckpointError, index_file
from mtp_dist.fs import write_durably

FORMAT = 1
BLOCK_BYTES = 1 << 20

ProgressCallback = Callable[[int, int], None]
"""Callback with the amount done and the total: in bytes for verification, in tensors for conversion."""


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


def record_of(path: Path, on_block: Callable[[int], None] = lambda size: None) -> FileRecord:
    """Read a file and return its size and hash. Call `on_block` with the size of each block read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            on_block(len(block))
    return FileRecord(size, digest.hexdigest())


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    files = {name: asdict(record) for name, record in sorted(records.items())}
    write_durably(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2))


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Return the record of each file by name. Raise InvalidCheckpointError if the manifest is missing or invalid."""
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
        if values.keys() != {"format", "files"} or values["format"] != FORMAT:
            raise ValueError(f"it does not have the keys of format {FORMAT}")
        if outside := [name for name in values["files"] if Path(name).name != name or name in ("", "..")]:
            raise ValueError(f"it names {outside[0]!r}, which is not the name of a file in this folder")
        return {name: FileRecord(**record) for name, record in values["files"].items()}
    except OSError as error:
        raise InvalidCheckpointError(folder, f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidCheckpointError(folder, f"{MANIFEST} is not a valid manifest ({error})") from None


def check_quickly(folder: Path) -> dict[str, FileRecord]:
    """Compare the size of each file and the content of the JSON files with the manifest, and return the manifest.

    Raise InvalidCheckpointError at the first difference, or if the manifest lacks a file that the checkpoint's own
    indexes name. Other files in the folder are ignored.
    """
    records = read_manifest(folder)
    for name in sorted(records):
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise InvalidCheckpointError(folder, f"{name} is missing") from None
        except OSError as error:
            raise InvalidCheckpointError(folder, f"{name} cannot be read ({error.strerror})") from None
        if size != records[name].bytes:
            raise InvalidCheckpointError(folder, f"{name} has {size} bytes, it was written with {records[name].bytes}")
        if name.endswith(".json"):
            check_content(folder, name, records[name])
    _check_parts(folder, records)
    return records


def _check_parts(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise InvalidCheckpointError unless the manifest has every file that a checkpoint consists of."""
    updates = _read_listed_json(folder, METADATA_FILE, records).get("optimizer_updates")
    for kind in (MODEL, OPTIMIZER) if updates else (MODEL,):
        weight_map = _read_listed_json(folder, index_file(kind), records).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InvalidCheckpointError(folder, f"{index_file(kind)} has no weight_map")
        if unknown := [file for file in weight_map.values() if file not in records]:
            raise InvalidCheckpointError(folder, f"{unknown[0]}, which {index_file(kind)} names, is not in {MANIFEST}")


def _read_listed_json(folder: Path, name: str, records: Mapping[str, FileRecord]) -> dict[str, Any]:
    if name not in records:
        raise InvalidCheckpointError(folder, f"{name} is not in {MANIFEST}")
    try:
        values = json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidCheckpointError(folder, f"{name} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise InvalidCheckpointError(folder, f"{name} is not a mapping")
    return values


def check_content(
    folder: Path, name: str, written: FileRecord, on_block: Callable[[int], None] = lambda size: None
) -> None:
    """Read a file and compare it with its record. Raise InvalidCheckpointError if they differ."""
    try:
        found = record_of(folder / name, on_block)
    except OSError as error:
        raise InvalidCheckpointError(folder, f"{name} cannot be read ({error.strerror})") from None
    if found != written:
        raise InvalidCheckpointError(
            folder, f"{name} has the SHA-256 {found.sha256[:12]}..., it was written with {written.sha256[:12]}..."
        )


def tensor_files(records: Mapping[str, FileRecord]) -> list[str]:
    """Return the names of the files whose content `check_quickly` does not read."""
    return [name for name in sorted(records) if not name.endswith(".json")]


def check_fully(folder: Path, on_progress: ProgressCallback = lambda done, total: None) -> dict[str, FileRecord]:
    """Compare every file with the manifest, in this process, and return the manifest.

    Raise InvalidCheckpointError at the first difference.
    """
    return _check_tensors(folder, "", on_progress)


def check_weights(folder: Path, on_progress: ProgressCallback = lambda done, total: None) -> dict[str, FileRecord]:
    """Compare what `check_quickly` compares and the content of the weights with the manifest. Return the manifest.

    The moments, two thirds of a checkpoint, are not read. Raise InvalidCheckpointError at the first difference.
    """
    return _check_tensors(folder, f"{MODEL}-", on_progress)


def _check_tensors(folder: Path, prefix: str, on_progress: ProgressCallback) -> dict[str, FileRecord]:
    """Check quickly, then the content of the tensor files whose names have the prefix."""
    records = check_quickly(folder)
    names = [name for name in tensor_files(records) if name.startswith(prefix)]
    total, done = sum(records[name].bytes for name in names), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        on_progress(done, total)

    for name in names:
        check_content(folder, name, records[name], count)
    return records
