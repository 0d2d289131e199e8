"""Finding checkpoints: which a folder contains, which one a run resumes from, and whether it may."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtp_dist.checkpoint.format import (
    LATEST,
    MANIFEST,
    METADATA_FILE,
    REPLACED,
    CheckpointMetadata,
    InvalidCheckpointError,
    read_metadata,
)
from mtp_dist.checkpoint.manifest import ProgressCallback, check_quickly, check_weights
from mtp_dist.config import Config, SourceConfig
from mtp_dist.errors import CheckpointError, ConfigError

UNCHECKED_KEYS = frozenset(
    """
    run.name run.output_dir run.device run.step_timeout run.join_timeout heads.loss_mode heads.chunk_tokens
    heads.stages data.validation data.max_text_loss train.micro_batch_size train.activation_checkpointing
    train.deterministic train.validate_every train.validation_samples train.max_skipped_steps train.spike_deviations
    train.spike_rollback
    """.split()
)
"""Keys that may differ at a resume: they set reports, speed, rounding or the reaction to a fault."""
UNCHECKED_SECTIONS = frozenset({"parallel", "checkpoint", "log", "deepspeed"})
"""Sections of which every key may differ at a resume."""
FIXED_BEFORE_TRAINING = frozenset(
    """
    heads.kind heads.count heads.layers_per_head heads.repeated heads.prediction_distances heads.unembedding
    heads.condition heads.condition_rank heads.weighted_hidden_states data.tokenizer
    """.split()
)
"""Keys outside `model` that define the weights of a model that no step has trained, such as an imported one."""
LOW_RANK = "train.low_rank"
"""Key that cannot change at a resume: adapters may only be merged, which `checkpoint.initial_weights` does."""
_FINISHED = re.compile(r"step_(\d{8,})(\.replaced)?")

logger = logging.getLogger(__name__)


def is_checkpoint(path: Path) -> bool:
    """Return whether the path is meant to be a checkpoint, valid or not, and not a folder of them."""
    named = _FINISHED.fullmatch(path.name) and path.is_dir()
    return bool(named) or any((path / name).exists() for name in (METADATA_FILE, MANIFEST))


def checkpoint_directory(path: Path) -> Path:
    """Return a run's folder of checkpoints for the run's folder, and any other path unchanged."""
    below = path / "checkpoints"
    return below if below.is_dir() and not finished_checkpoints(path) else path


def finished_checkpoints(directory: Path) -> dict[int, Path]:
    """Return the checkpoints of a folder by step, the highest first."""
    found: dict[int, Path] = {}
    for path in sorted(directory.glob("step_*")):  # `step_00000010` before `step_00000010.replaced`
        if (match := _FINISHED.fullmatch(path.name)) and path.is_dir():
            found.setdefault(int(match[1]), path)
    return dict(sorted(found.items(), reverse=True))


def latest_name(directory: Path) -> str | None:
    """Return the content of `latest`: empty if it cannot be read, None if it does not exist."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return ""


def candidates(directory: Path) -> list[Path]:
    """Return the checkpoints to start from, best first: the one that `latest` names, then those of lower steps.

    Raise CheckpointError if `latest` names one and the folder has none at all.
    """
    found, latest, name = finished_checkpoints(directory), directory / LATEST, latest_name(directory)
    if name is None:
        return list(found.values())
    if not found:
        raise CheckpointError(
            f"{latest} names {name!r}, but {directory} contains no checkpoint: restore that one, or start from scratch "
            "with checkpoint.resume=none"
        )
    latest_step = next((step for step, path in found.items() if path.name.removesuffix(REPLACED) == name), None)
    if latest_step is None:
        logger.warning("%s names %r, which does not exist: taking the highest step", latest, name)
        return list(found.values())
    if max(found) > latest_step:
        logger.warning("%s names %s: %s and all later checkpoints are not used", latest, name, found[max(found)].name)
    return [path for step, path in found.items() if step <= latest_step]


def checkpoints_in(path: Path) -> list[Path]:
    """Return the folder itself, or the checkpoints in it or in this run's folder, best first."""
    return [path] if is_checkpoint(path) else candidates(checkpoint_directory(path))


def first_valid(folders: Sequence[Path], check: Callable[[Path], object], problem: str | None = None) -> Path:
    """Return the first checkpoint that passes the check. Log a warning for each one before it.

    problem: why a better checkpoint, not in `folders`, is invalid. Raise CheckpointError if none passes.
    """
    for folder in folders:
        if problem:
            logger.warning("%s: trying %s", problem, folder)
        try:
            check(folder)
            return folder
        except InvalidCheckpointError as error:
            problem = str(error)
    raise CheckpointError(f"{problem}; no older checkpoint is left: restore it, or name another checkpoint")


def find_valid_checkpoint(path: Path, on_progress: ProgressCallback = lambda done, total: None) -> Path | None:
    """Return the folder itself, or the best checkpoint in it whose weights are valid; None if it has none.

    Raise CheckpointError if none is valid. `on_progress` follows the verification of the weights.
    """
    folders = checkpoints_in(path)
    return first_valid(folders, lambda folder: check_weights(folder, on_progress)) if folders else None


def find_named_checkpoint(path: Path, label: str, check: Callable[[Path], object]) -> Path:
    """Return the checkpoint that a user names, or the best valid one in the folder, which may be a run's.

    label: the option or key with its value, which begins each message. check: raises InvalidCheckpointError for a
    corrupt checkpoint. Raise CheckpointError if there is no valid one.
    """
    if (path / METADATA_FILE).exists() and not (path / MANIFEST).exists():
        raise CheckpointError(
            f"{label} has no {MANIFEST}: it is an incomplete checkpoint, or a model of Hugging Face, which mtp-dist "
            "import converts"
        )
    try:
        if path.is_dir() and (folders := checkpoints_in(path)):
            return first_valid(folders, check)
    except CheckpointError as error:
        raise CheckpointError(f"{label} cannot be opened: {error}") from None
    raise CheckpointError(
        f"{label} {_missing(path)}: give a run's folder, a checkpoint such as step_00000010, or a folder that mtp-dist "
        "export wrote"
    )


def _missing(path: Path) -> str:
    """Return why a path has no model."""
    if not path.exists():
        return "does not exist"
    if not path.is_dir():
        return "is a file"
    if (path / "run.json").exists() or (path / "checkpoints").is_dir():
        return "is a run that has not saved a checkpoint yet"
    return "contains neither a checkpoint nor an export of mtp-dist"


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that a run resumes from."""

    folder: Path
    step: int
    """Completed steps."""
    config: Config
    """Configuration that the checkpoint was saved with."""
    samples: Any = None
    """State of the training samples."""
    recent_losses: Sequence[float] = ()
    """See `RunState`."""
    older: tuple[Path, ...] = ()
    """Checkpoints to start from instead if this one is corrupt, best first."""


def find_resume_point(config: Config) -> ResumePoint | None:
    """Return the checkpoint that `checkpoint.resume` selects; None for a run from scratch. Read no tensors.

    Raise CheckpointError if there is no valid one, ConfigError if the run would differ from the one that saved it.
    """
    folders = _selected(config)
    return _resume_point(folders, None, config) if folders else None


def older_resume_point(point: ResumePoint, problem: str, config: Config) -> ResumePoint:
    """Return the next best checkpoint if `point` is corrupt. Raise what `find_resume_point` raises."""
    return _resume_point(point.older, problem, config)


def _selected(config: Config) -> list[Path]:
    """Return the checkpoints that `checkpoint.resume` selects, best first."""
    resume = config.checkpoint.resume
    if resume == "none":
        return []
    if resume == "auto":
        return candidates(config.checkpoint_dir)
    folders = checkpoints_in(Path(resume).expanduser())
    if not folders:
        raise CheckpointError(
            f"checkpoint.resume = '{resume}' has no checkpoint: give 'auto', 'none', a folder such as "
            "step_00000010, or a folder of these"
        )
    return folders


def _resume_point(folders: Sequence[Path], problem: str | None, config: Config) -> ResumePoint:
    folder = first_valid(folders, check_quickly, problem)
    saved = read_metadata(folder)
    if saved.config.vocab_size != config.vocab_size:
        raise ConfigError(
            f"{folder} has a vocabulary of {saved.config.vocab_size} tokens, this run one of {config.vocab_size}: "
            "use the same data.tokenizer and model.vocab_size, or start from scratch with checkpoint.resume=none"
        )
    if differences := list(_differences(saved, config, folder)):
        raise ConfigError("\n".join(differences))
    if not saved.step:
        warn_of_longer_samples(saved.config, config, folder)
    older = tuple(folders[folders.index(folder) + 1 :])
    return ResumePoint(folder, saved.step, saved.config, saved.samples, saved.recent_losses, older)


def warn_of_longer_samples(saved: Config, wanted: Config, folder: Path) -> None:
    """Log a warning if the samples of a new run are longer than those that the weights were trained with."""
    length = wanted.train.sequence_length
    if length > saved.train.sequence_length:
        logger.warning(
            "train.sequence_length = %s exceeds the %s positions of %s: its model has not been trained on longer "
            "texts; model.rope_scaling stretches its positions",
            length,
            saved.train.sequence_length,
            folder,
        )


def _differences(saved: CheckpointMetadata, wanted: Config, folder: Path) -> Iterator[str]:
    """Yield a message for each key whose new value would change the model or its training."""
    before, now = _keys(saved.config), _keys(wanted)
    allowed = wanted.checkpoint.allow_changes
    for key in allowed:
        if key not in now or key.startswith("model.") or key == LOW_RANK:
            yield f"checkpoint.allow_changes names {key}, which is not a key that may change at a resume"
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
            yield difference + "set it back, or start from scratch with checkpoint.resume=none"
        elif key == LOW_RANK:
            yield difference + f"set it back, or start a new run with checkpoint.initial_weights={folder}"
        else:
            yield (
                difference + "set it back, start from scratch with checkpoint.resume=none, or resume with the new "
                f"value with checkpoint.allow_changes=[{key}]"
            )


def _differing_sources(sources: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    """Return as YAML, by the source's number, the keys in which each source differs from the other one of that number.

    A source that the others lack has the keys that were set; a source that only the others have is null.
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
    # A source's name is only for the logs.
    keys["data.train"] = [source | {"name": None} for source in keys["data.train"]]
    return keys
