"""The format of a checkpoint: a folder `step_00000010` of full tensors by global name, which any layout can open.

`model-*.safetensors` contain the fp32 weights and `optimizer-*.safetensors` Adam's moments of the trained ones, one
file of each per rank that wrote; an index next to them maps tensors to files as Hugging Face's does. `config.json`
contains the metadata and `manifest.json` the size and SHA-256 of every file.

A checkpoint is written as `step_00000010.unfinished`; the text file `latest` names the last finished one. An earlier
checkpoint of the same step is kept as `.replaced`, and remains valid, until the new one has been renamed; `.deleted`
marks a checkpoint whose files are being removed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtp_dist.config import Config, config_to_save, saved_config
from mtp_dist.errors import CheckpointError, UserError
from mtp_dist.fs import write_durably
from mtp_dist.versions import installed_versions

MODEL, OPTIMIZER = "model", "optimizer"
METADATA_FILE, MANIFEST = "config.json", "manifest.json"
LATEST = "latest"
UNFINISHED, REPLACED, DELETED = ".unfinished", ".replaced", ".deleted"
CHECKPOINT_FILES = (f"step_{'[0-9]' * 8}*", LATEST, f"{LATEST}{UNFINISHED}")
"""Patterns of everything that this program writes into a folder of checkpoints."""


class InvalidCheckpointError(CheckpointError):
    """A checkpoint that is not, or no longer, what was written."""

    def __init__(self, folder: Path, problem: object) -> None:
        super().__init__(folder, str(problem))

    def __str__(self) -> str:
        return "{} is not a valid mtp_dist checkpoint (corrupt or incomplete): {}".format(*self.args)


@dataclass(frozen=True)
class RunState:
    """Progress of a run, in addition to its weights and moments."""

    step: int
    """Completed steps."""
    losses: Sequence[float | None] = ()
    """Losses of heads 1, 2, ... in that step, in nats."""
    recent_losses: Sequence[float] = ()
    """Previous losses of head 1, with which the next one is compared to detect a spike."""
    samples: Any = None
    """State of the training samples, as JSON."""


@dataclass(frozen=True)
class SavedLayout:
    """Parallel degrees of the run that saved."""

    tensor: int
    pipeline: int
    data: int
    world_size: int
    zero_stage: int
    """The stage that DeepSpeed ran with: at least 1 in bf16."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """The content of `config.json`."""

    step: int
    """Completed steps."""
    optimizer_updates: int
    """Updates that Adam's bias correction counts: all steps but those skipped for a NaN or infinite gradient."""
    config: Config
    samples: Any = None
    """State of the training samples, as JSON."""
    losses: Sequence[float | None] = ()
    """Losses of heads 1, 2, ... in the step, in nats; None for NaN or infinity. Empty in an imported checkpoint."""
    recent_losses: Sequence[float] = ()
    """See `RunState`."""
    layout: SavedLayout | None = None
    """None in an imported checkpoint."""
    versions: dict[str, str | None] = field(default_factory=installed_versions)
    """Versions of the packages that wrote it; None for a package that was not installed."""

    def write(self, folder: Path) -> None:
        layout = asdict(self.layout) if self.layout else None
        first = {"step": self.step, "vocab_size": self.config.vocab_size}
        values = first | self.__dict__ | config_to_save(self.config) | {"layout": layout}
        write_durably(folder / METADATA_FILE, json.dumps(values, indent=2))


def read_metadata(folder: Path) -> CheckpointMetadata:
    """Return the content of `config.json`. Raise CheckpointError if it is missing, corrupt or of a newer version."""
    try:
        values = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
        return CheckpointMetadata(
            step=int(values["step"]),
            optimizer_updates=int(values["optimizer_updates"]),
            config=saved_config(values),
            samples=values["samples"],
            losses=tuple(values["losses"]),
            recent_losses=tuple(values["recent_losses"]),
            layout=SavedLayout(**values["layout"]) if values["layout"] else None,
            versions=values["versions"],
        )
    except OSError as error:
        raise InvalidCheckpointError(folder, f"{error.filename} cannot be read ({error.strerror})") from None
    except UserError as error:
        raise CheckpointError(f"{folder} cannot be opened: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidCheckpointError(folder, error) from None


def checkpoint_path(config: Config, step: int) -> Path:
    return config.checkpoint_dir / f"step_{step:08d}"


def tensor_file(kind: str, rank: int, ranks: int) -> str:
    return f"{kind}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def index_file(kind: str) -> str:
    return f"{kind}.safetensors.index.json"
