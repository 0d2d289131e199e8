"""Which checkpoint a run goes on from, and whether it may."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtp_dist.checkpoint.format import LATEST, MANIFEST, METADATA_FILE, REPLACED, CheckpointMetadata, read_metadata
from mtp_dist.checkpoint.manifest import DamagedCheckpointError, ProgressCallback, check_quickly, check_weights
from mtp_dist.config import Config, SourceConfig
from mtp_dist.errors import ConfigError

_FINISHED = re.compile(r"step_(\d{8,})(\.replaced)?")
UNCHECKED_KEYS = frozenset(
    """
    run.name run.output_dir run.device run.step_timeout run.join_timeout heads.loss_mode heads.chunk_tokens
    data.validation data.max_text_loss train.micro_batch_size train.activation_checkpointing train.deterministic
    train.validate_every train.validation_samples train.max_skipped_steps train.spike_deviations train.spike_rollback
    """.split()
)
"""Keys that change what a run says, how fast it is or what it does about a fault, not what it learns without one."""
UNCHECKED_SECTIONS = frozenset({"parallel", "checkpoint", "log", "deepspeed"})
FIXED_BEFORE_TRAINING = frozenset(
    """
    heads.kind heads.count heads.layers_per_head heads.repeated heads.prediction_distances heads.unembedding
    data.tokenizer
    """.split()
)
"""Keys outside `model` that say what the weights of a model are that no step has trained, as imported ones."""


def is_checkpoint(path: Path) -> bool:
    """Whether the path is meant to be a checkpoint, maybe a damaged one, and not a folder of them."""
    named = _FINISHED.fullmatch(path.name) and path.is_dir()
    return bool(named) or any((path / name).exists() for name in (METADATA_FILE, MANIFEST))


def checkpoint_directory(path: Path) -> Path:
    """Return a run's folder of checkpoints for the run's folder, and any other path as it is."""
    below = path / "checkpoints"
    return below if below.is_dir() and not finished_checkpoints(path) else path


def finished_checkpoints(directory: Path) -> dict[int, Path]:
    """By step, the highest first."""
    found: dict[int, Path] = {}
    for path in sorted(directory.glob("step_*")):  # `step_00000010` before `step_00000010.replaced`
        if (match := _FINISHED.fullmatch(path.name)) and path.is_dir():
            found.setdefault(int(match[1]), path)
    return dict(sorted(found.items(), reverse=True))


def latest_name(directory: Path) -> str | None:
    """What `latest` says, nothing where it cannot be read; None where it is missing."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return ""


def candidates(directory: Path, warn: Callable[[str], None]) -> list[Path]:
    """The checkpoints to start from, best first: the one that `latest` names, then those of lower steps.

    Raises ConfigError where `latest` names one and there is none at all.
    """
    found, latest, name = finished_checkpoints(directory), directory / LATEST, latest_name(directory)
    if name is None:
        return list(found.values())
    if not found:
        raise ConfigError(
            f"{latest} names {name!r}, but no checkpoint is in {directory}: bring it back, or start anew with "
            "checkpoint.resume=none"
        )
    step = next((step for step, path in found.items() if path.name.removesuffix(REPLACED) == name), None)
    if step is None:
        warn(f"{latest} names {name!r}, which is not there: taking the highest step")
        return list(found.values())
    if max(found) > step:
        warn(f"{latest} names {name}: {found[max(found)].name} and whatever else came after it is not used")
    return [path for of_step, path in found.items() if of_step <= step]


@dataclass(frozen=True)
class ResumePoint:
    folder: Path
    step: int
    """Updates made."""
    config: Config
    """The configuration it was saved with."""
    samples: Any = None
    """State of the training samples."""
    recent_losses: Sequence[float] = ()
    """See `RunState`."""
    older: tuple[Path, ...] = ()
    """What to start from instead where this one turns out to be damaged, best first."""


def find_resume_point(config: Config) -> ResumePoint | None:
    """What `checkpoint.resume` asks for; None where the run starts anew. Tensors are not read: see load.py.

    Raises ConfigError where there is no such checkpoint, where all are damaged, or where the run would be another one
    than the one saved.
    """
    folders = _wanted(config)
    return _resume_point(folders, None, config) if folders else None


def older_resume_point(point: ResumePoint, damage: str, config: Config) -> ResumePoint:
    """The next best where `point` is damaged. Raises ConfigError as `find_resume_point` does."""
    return _resume_point(point.older, damage, config)


def _resume_point(folders: Sequence[Path], damage: str | None, config: Config) -> ResumePoint:
    folder = first_valid(folders, check_quickly, damage)
    saved = read_metadata(folder)
    if saved.config.vocab_size != config.vocab_size:
        raise ConfigError(
            f"{folder} has a vocabulary of {saved.config.vocab_size} tokens, this run one of {config.vocab_size}: "
            "use the same data.tokenizer and model.vocab_size, or start anew with checkpoint.resume=none"
        )
    if wrong := list(_differences(saved, config, folder)):
        raise ConfigError("\n".join(wrong))
    length = config.train.sequence_length
    if not saved.step and length > saved.config.train.sequence_length:
        _warn(
            f"train.sequence_length = {length} exceeds the {saved.config.train.sequence_length} positions of {folder}: "
            "its model has not been trained on longer texts; model.rope_scaling stretches its positions"
        )
    older = tuple(folders[folders.index(folder) + 1 :])
    return ResumePoint(folder, saved.step, saved.config, saved.samples, saved.recent_losses, older)


def first_valid(folders: Sequence[Path], check: Callable[[Path], object], damage: str | None = None) -> Path:
    """The first checkpoint that passes the check; the damage of those before it is told.

    damage: that of one before all of these. Raises ConfigError where none passes.
    """
    for folder in folders:
        if damage:
            _warn(f"{damage}: trying {folder}")
        try:
            check(folder)
            return folder
        except DamagedCheckpointError as error:
            damage = str(error)
    raise ConfigError(f"{damage}; there is no older one to use instead: restore it, or name another checkpoint")


def _warn(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _wanted(config: Config) -> list[Path]:
    """Where `checkpoint.resume` would start, best first."""
    wanted = config.checkpoint.resume
    if wanted == "none":
        return []
    if wanted == "auto":
        return candidates(config.checkpoint_dir, _warn)
    folders = checkpoints_in(Path(wanted).expanduser())
    if not folders:
        raise ConfigError(
            f"checkpoint.resume = '{wanted}' has no checkpoint: give 'auto', 'none', a folder such as "
            "step_00000010, or a folder of these"
        )
    return folders


def checkpoints_in(path: Path) -> list[Path]:
    """Return the folder itself, or the checkpoints in it or in this run's folder, best first."""
    return [path] if is_checkpoint(path) else candidates(checkpoint_directory(path), _warn)


def find_valid_checkpoint(path: Path, watch: ProgressCallback = lambda done, total: None) -> Path | None:
    """Return the folder itself, or the best checkpoint in it whose weights are intact; None if there is none.

    Raise ConfigError if all are damaged. `watch` follows the verification of the weights.
    """
    folders = checkpoints_in(path)
    return first_valid(folders, lambda folder: check_weights(folder, watch)) if folders else None


def _differences(saved: CheckpointMetadata, wanted: Config, folder: Path) -> Iterator[str]:
    """One sentence for each key that would make another model or another training of it."""
    before, now = _keys(saved.config), _keys(wanted)
    allowed = wanted.checkpoint.allow_changes
    for key in allowed:
        if key not in now or key.startswith("model."):
            yield f"checkpoint.allow_changes names {key}, which is not a key that may change from one start to the next"
    for key, value in now.items():
        if (
            before.get(key) == value
            or key in UNCHECKED_KEYS
            or key in allowed
            or key.split(".")[0] in UNCHECKED_SECTIONS
        ):
            continue
        if not saved.step and not key.startswith("model.") and key not in FIXED_BEFORE_TRAINING:
            continue
        texts = repr(value), repr(before.get(key))
        if key == "data.train":
            texts = _differing_sources(value, before[key]), _differing_sources(before[key], value)
        difference = f"{key} is {texts[0]}, {folder} was trained with {texts[1]}: "
        if key.startswith("model."):
            yield difference + "set it back, or start anew with checkpoint.resume=none"
        else:
            yield (
                difference + f"set it back, start anew with checkpoint.resume=none, or go on with the new value with "
                f"checkpoint.allow_changes=[{key}]"
            )


def _differing_sources(sources: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    """Return as YAML, by the source's number, the keys in which each source differs from the other one of that number.

    A source that the others lack has the keys that were set, one that only the others have is null.
    """
    unset = SourceConfig(path="-").model_dump(mode="json")
    differing = {}
    for number in range(max(len(sources), len(others))):
        source = sources[number] if number < len(sources) else None
        other = others[number] if number < len(others) else unset
        if source != other:
            differing[number] = source and {key: value for key, value in source.items() if value != other[key]}
    return yaml.safe_dump(differing, default_flow_style=True, width=10_000).strip()


def _keys(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json").items()
    keys = {f"{name}.{key}": value for name, section in sections for key, value in section.items()}
    # A name is for the logs.
    keys["data.train"] = [source | {"name": None} for source in keys["data.train"]]
    return keys
