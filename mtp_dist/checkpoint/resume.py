"""Which checkpoint a run goes on from, and whether it may."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_dist.checkpoint.files import DESCRIPTION, Description, newest_checkpoint, read_description
from mtp_dist.config import Config, ConfigError

FREE = frozenset(
    """
    run.name run.output_dir run.device heads.loss_mode heads.chunk_tokens data.validation train.micro_batch_size
    train.activation_checkpointing train.validate_every train.validation_samples
    """.split()
)
"""Keys that change what a run says or how fast it is, not what it learns."""
FREE_SECTIONS = frozenset({"parallel", "checkpoint", "log", "deepspeed"})
FIXED_BEFORE_TRAINING = frozenset(
    """
    heads.kind heads.count heads.layers_per_head heads.repeated heads.prediction_distances heads.unembedding
    data.tokenizer
    """.split()
)
"""Keys outside `model` that say what the weights of a model are that no step has trained, as imported ones."""


@dataclass(frozen=True)
class ResumePoint:
    folder: Path
    step: int
    """Updates made."""
    samples: Any = None
    """State of the training samples."""


def find_resume_point(config: Config, vocab_size: int) -> ResumePoint | None:
    """What `checkpoint.resume` asks for; None where the run starts anew.

    Raises ConfigError where there is no such checkpoint, or where the run would be another one than the one saved.
    """
    folder = _find(config)
    if folder is None:
        return None
    saved = read_description(folder)
    if saved.vocab_size != vocab_size:
        raise ConfigError(
            f"{folder} has a vocabulary of {saved.vocab_size} tokens, this run one of {vocab_size}: use the same "
            "data.tokenizer and model.vocab_size, or start anew with checkpoint.resume=none"
        )
    if wrong := list(_differences(saved, config, folder)):
        raise ConfigError("\n".join(wrong))
    return ResumePoint(folder, saved.step, saved.samples)


def _find(config: Config) -> Path | None:
    wanted = config.checkpoint.resume
    if wanted == "none":
        return None
    if wanted == "auto":
        return newest_checkpoint(config.checkpoint_dir)
    folder = checkpoint_in(Path(wanted).expanduser())
    if folder is None:
        raise ConfigError(
            f"checkpoint.resume = '{wanted}' has no checkpoint: give 'auto', 'none', a folder such as "
            "step_00000010, or a folder of these"
        )
    return folder


def checkpoint_in(path: Path) -> Path | None:
    """The folder itself, or the newest checkpoint in it."""
    return path if (path / DESCRIPTION).exists() else newest_checkpoint(path)


def _differences(saved: Description, wanted: Config, folder: Path) -> Iterator[str]:
    """One sentence for each key that would make another model or another training of it."""
    before, now = _keys(saved.config), _keys(wanted)
    allowed = wanted.checkpoint.allow_changes
    for key in allowed:
        if key not in now or key.startswith("model."):
            yield f"checkpoint.allow_changes names {key}, which is not a key that may change from one start to the next"
    for key, value in now.items():
        if before.get(key) == value or key in FREE or key in allowed or key.split(".")[0] in FREE_SECTIONS:
            continue
        if not saved.step and not key.startswith("model.") and key not in FIXED_BEFORE_TRAINING:
            continue
        difference = f"{key} is {value!r}, {folder} was trained with {before.get(key)!r}: "
        if key.startswith("model."):
            yield difference + "set it back, or start anew with checkpoint.resume=none"
        else:
            yield (
                difference + f"set it back, start anew with checkpoint.resume=none, or go on with the new value with "
                f"checkpoint.allow_changes=[{key}]"
            )


def _keys(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json").items()
    keys = {f"{name}.{key}": value for name, section in sections for key, value in section.items()}
    # A name is for the logs.
    keys["data.train"] = [source | {"name": None} for source in keys["data.train"]]
    return keys
