"""What a checkpoint consists of: a folder `step_00000010` of whole tensors by global name, so any layout opens it.

`model-*.safetensors` have the fp32 weights and `optimizer-*.safetensors` Adam's moments, one file of either for each
rank that wrote; an index beside them says which tensor is in which file, as Hugging Face does it. `config.json` says
the rest. `manifest.json` tells whether all of it is still what was written.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mtp_dist.config import Config, config_to_save, saved_config
from mtp_dist.errors import ConfigError, UserError
from mtp_dist.fs import write_durably

MODEL, OPTIMIZER = "model", "optimizer"
METADATA_FILE, MANIFEST = "config.json", "manifest.json"
LATEST = "latest"
UNFINISHED, REPLACED, DELETED = ".unfinished", ".replaced", ".deleted"
CHECKPOINT_FILES = (f"step_{'[0-9]' * 8}*", LATEST, f"{LATEST}{UNFINISHED}")
"""Patterns of everything that this program writes into the folder."""


@dataclass(frozen=True)
class RunState:
    """How far a run has come, beside what its weights and moments say."""

    step: int
    """Updates made."""
    losses: Sequence[float | None] = ()
    """Of heads 1, 2, .. in that step, in nats."""
    recent_losses: Sequence[float] = ()
    """Of head 1, what the next step's is compared with to notice a spike."""
    samples: Any = None
    """State of the training samples, as JSON."""


@dataclass(frozen=True)
class SavedLayout:
    """Degrees of the run that saved."""

    tensor: int
    pipeline: int
    data: int
    world_size: int
    zero_stage: int
    """The one that DeepSpeed ran with: in bf16 at least 1."""


def installed_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in ("mtp-dist", "torch", "deepspeed", "megatron-core"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


@dataclass(frozen=True)
class CheckpointMetadata:
    """What `config.json` says."""

    step: int
    """Updates made."""
    optimizer_updates: int
    """Those that Adam's bias correction counts: without steps dropped for a gradient that was not finite."""
    config: Config
    samples: Any = None
    """State of the training samples, as JSON."""
    losses: Sequence[float | None] = ()
    """Of heads 1, 2, .. in the step, in nats; None for one that was not finite. Empty in an imported checkpoint."""
    recent_losses: Sequence[float] = ()
    """See `RunState`."""
    layout: SavedLayout | None = None
    """None in an imported checkpoint."""
    versions: dict[str, str | None] = field(default_factory=installed_versions)
    """Of the packages that wrote it; None for one that was not installed."""

    def write(self, folder: Path) -> None:
        layout = asdict(self.layout) if self.layout else None
        values = self.__dict__ | config_to_save(self.config) | {"vocab_size": self.config.vocab_size, "layout": layout}
        write_durably(folder / METADATA_FILE, json.dumps(values, indent=2))


def read_metadata(folder: Path) -> CheckpointMetadata:
    """Return what `config.json` says. Raise ConfigError if it is missing, damaged or of a newer version."""
    try:
        values = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        numbers = {key: int(values[key]) for key in ("step", "optimizer_updates")}
        return CheckpointMetadata(
            **numbers,
            config=saved_config(values),
            samples=values["samples"],
            losses=tuple(values["losses"]),
            recent_losses=tuple(values["recent_losses"]),
            layout=SavedLayout(**values["layout"]) if values["layout"] else None,
            versions=values["versions"],
        )
    except OSError as error:
        raise ConfigError(f"{folder} is not a whole checkpoint: {error.filename} cannot be read") from None
    except UserError as error:
        raise ConfigError(f"{folder} cannot be opened: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder} is not a checkpoint of ours, or a damaged one: {error}") from None


def tensor_file(kind: str, rank: int, ranks: int) -> str:
    return f"{kind}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def index_file(kind: str) -> str:
    return f"{kind}.safetensors.index.json"


def checkpoint_path(config: Config, step: int) -> Path:
    return config.checkpoint_dir / f"step_{step:08d}"


def with_suffix_appended(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
