"""Other layouts of the same training."""

import json
import shlex
from collections import defaultdict
from typing import Any, get_args

from mtp_dist.config import Config, resolve
from mtp_dist.config.schema import ParallelConfig
from mtp_dist.config.validation import incompatible_settings
from mtp_dist.errors import ConfigError
from mtp_dist.planner.schedule import ScheduleName

Changes = dict[str, Any]
"""Values of keys such as `parallel.tensor`."""

SCHEDULES: tuple[ScheduleName, ...] = get_args(ParallelConfig.model_fields["schedule"].annotation)
LAYOUT_KEYS = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.schedule",
    "parallel.partition",
    "parallel.sequence",
    "parallel.zero_stage",
    "train.activation_checkpointing",
    "train.micro_batch_size",
    "heads.stages",
)
"""Keys of a layout."""


def layout(config: Config) -> Changes:
    """Return the values of LAYOUT_KEYS."""
    sections = config.model_dump(include={"parallel", "train", "heads"})
    return {key: sections[key.split(".")[0]][key.split(".")[1]] for key in LAYOUT_KEYS}


def overrides(changes: Changes) -> str:
    """Return the values as arguments of a command in a shell."""
    texts = {key: json.dumps(value, separators=(",", ":")).strip('"') for key, value in changes.items()}
    return shlex.join(f"{key}={text}" for key, text in texts.items())


def stays_within_nodes(ranks: int, world_size: int, per_node: int) -> bool:
    """Return whether each group of `ranks` neighbouring ranks is on one node."""
    return world_size <= per_node or per_node % ranks == 0


def replace_values(config: Config, changes: Changes) -> Config:
    """Return a configuration with other values, unchecked."""
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in changes.items():
        section, name = key.split(".")
        sections[section][name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def with_layout(config: Config, changes: Changes, world_size: int | None = None) -> Config | None:
    """Return a configuration with other values, resolved; None if training would reject it.

    world_size: by default that of the configuration, which is then a resolved one.
    """
    changed = replace_values(config, changes)
    if any(incompatible_settings(changed)):
        return None
    try:
        return resolve(changed, changed.vocab_size, world_size or config.world_size)
    except ConfigError:
        return None
