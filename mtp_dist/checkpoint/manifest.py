"""`manifest.json`: each file of a checkpoint with its size and SHA-256, so that damage is found before it is loaded."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.format import MANIFEST, METADATA_FILE, MODEL, OPTIMIZER, index_file
from mtp_dist.errors import ConfigError
from mtp_dist.fs import write_durably

FORMAT = 1
BLOCK_BYTES = 1 << 20

ProgressCallback = Callable[[int, int], None]
"""Called with the number of bytes read and of all."""


class DamagedCheckpointError(ConfigError):
    """A checkpoint is not, or no longer, what was written."""

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(f"{folder} is not a checkpoint of ours, or a damaged one: {what}")


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


def record_of(path: Path, watch: Callable[[int], None] = lambda read: None) -> FileRecord:
    """Of what is on the disk; `watch` is told the size of each block read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            watch(len(block))
    return FileRecord(size, digest.hexdigest())


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest of these files."""
    files = {name: asdict(record) for name, record in sorted(records.items())}
    write_durably(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2))


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """By name of file. Raises DamagedCheckpointError where it is missing or is none."""
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
        if values.keys() != {"format", "files"} or values["format"] != FORMAT:
            raise ValueError(f"it has not the keys of format {FORMAT}")
        if outside := [name for name in values["files"] if Path(name).name != name or name in ("", "..")]:
            raise ValueError(f"it names {outside[0]!r}, which is not the name of a file in this folder")
        return {name: FileRecord(**record) for name, record in values["files"].items()}
    except OSError as error:
        raise DamagedCheckpointError(folder, f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(folder, f"{MANIFEST} is no manifest ({error})") from None


def check_quickly(folder: Path) -> dict[str, FileRecord]:
    """Compare the size of each file and the content of the JSON files with the manifest, and return the manifest.

    Raise DamagedCheckpointError for the first difference, and if a part is missing that the checkpoint's own indexes
    list. Other files in the folder do not matter.
    """
    records = read_manifest(folder)
    for name in sorted(records):
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            raise DamagedCheckpointError(folder, f"{name} is missing") from None
        except OSError as error:
            raise DamagedCheckpointError(folder, f"{name} cannot be read ({error.strerror})") from None
        if size != records[name].bytes:
            raise DamagedCheckpointError(folder, f"{name} has {size} bytes, it was written with {records[name].bytes}")
        if name.endswith(".json"):
            check_content(folder, name, records[name])
    _check_parts(folder, records)
    return records


def _check_parts(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Raise DamagedCheckpointError unless the manifest has all that the checkpoint consists of."""
    updates = _values_of(folder, METADATA_FILE, records).get("optimizer_updates")
    for kind in (MODEL, OPTIMIZER) if updates else (MODEL,):
        weight_map = _values_of(folder, index_file(kind), records).get("weight_map")
        if not isinstance(weight_map, dict):
            raise DamagedCheckpointError(folder, f"{index_file(kind)} has no weight_map")
        if unknown := [home for home in weight_map.values() if home not in records]:
            raise DamagedCheckpointError(folder, f"{unknown[0]}, which {index_file(kind)} names, is not in {MANIFEST}")


def _values_of(folder: Path, name: str, records: Mapping[str, FileRecord]) -> dict[str, Any]:
    if name not in records:
        raise DamagedCheckpointError(folder, f"{name} is not in {MANIFEST}")
    try:
        values = json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(folder, f"{name} cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise DamagedCheckpointError(folder, f"{name} is not a mapping")
    return values


def check_content(
    folder: Path, name: str, written: FileRecord, watch: Callable[[int], None] = lambda read: None
) -> None:
    """Read a file and compare it with its record. Raises DamagedCheckpointError."""
    try:
        found = record_of(folder / name, watch)
    except OSError as error:
        raise DamagedCheckpointError(folder, f"{name} cannot be read ({error.strerror})") from None
    if found != written:
        raise DamagedCheckpointError(
            folder, f"{name} has the SHA-256 {found.sha256[:12]}..., it was written with {written.sha256[:12]}..."
        )


def tensor_files(records: Mapping[str, FileRecord]) -> list[str]:
    """The files that `check_quickly` does not read."""
    return [name for name in sorted(records) if not name.endswith(".json")]


def check_fully(folder: Path, watch: ProgressCallback = lambda done, total: None) -> dict[str, FileRecord]:
    """Compare everything with the manifest, in this process, and return the manifest.

    Raises DamagedCheckpointError for the first difference.
    """
    records = check_quickly(folder)
    _check_contents(folder, tensor_files(records), records, watch)
    return records


def check_weights(folder: Path, watch: ProgressCallback = lambda done, total: None) -> dict[str, FileRecord]:
    """Compare what `check_quickly` compares, and the content of the weights, with the manifest. Return the manifest.

    The moments, two thirds of a checkpoint, are not read. Raises DamagedCheckpointError for the first difference.
    """
    records = check_quickly(folder)
    names = [name for name in tensor_files(records) if name.startswith(f"{MODEL}-")]
    _check_contents(folder, names, records, watch)
    return records


def _check_contents(
    folder: Path, names: Sequence[str], records: Mapping[str, FileRecord], watch: ProgressCallback
) -> None:
    total, done = sum(records[name].bytes for name in names), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        watch(done, total)

    for name in names:
        check_content(folder, name, records[name], count)
