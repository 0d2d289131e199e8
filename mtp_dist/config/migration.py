"""Configurations in checkpoints and exports, which keep the keys of the version that wrote them.

To rename or remove a key: raise VERSION, and add to MIGRATIONS what makes the new keys of the old ones.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from mtp_dist.config.base import MAX_INTEGER
from mtp_dist.config.loader import typed_config
from mtp_dist.config.schema import Config
from mtp_dist.errors import ConfigError

VERSION = 2
"""That of the keys in config/sections.py; a file without a version has the first."""


def _from_version_1(values: dict[str, Any]) -> None:
    """Give the gradients' type a key of its own, and lower counts to the limit that they have now."""
    given = values.get("deepspeed", {}).pop("communication_data_type", None)
    if given in ("bf16", "bfp16", "bfloat16") and values["train"]["precision"] == "bf16":
        values["parallel"]["grad_reduce_dtype"] = "bf16"
    for name, section in values.items():
        for key, value in section.items():
            # Such as a `checkpoint.every` of 10 billion, for never.
            if (name, key) != ("run", "seed") and isinstance(value, int) and value > MAX_INTEGER:
                section[key] = MAX_INTEGER


MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {1: _from_version_1}
"""By version, what changes a configuration in place into one of the next version."""


def saved_config(file: Mapping[str, Any]) -> Config:
    """Return the configuration in the JSON of a checkpoint or of an export, which has `config` and `config_version`.

    Settings that a run may not combine are not refused: what was saved was allowed then. Raise ConfigError if a newer
    version wrote it, or if it is none; KeyError or TypeError if there is none at all.
    """
    version, values = int(file.get("config_version", 1)), deepcopy(file["config"])
    if version > VERSION:
        raise ConfigError(
            f"its configuration is of version {version}, and this program reads up to version {VERSION}: install a "
            "newer mtp-dist"
        )
    for number in range(version, VERSION):
        MIGRATIONS[number](values)
    values["model"]["vocab_size"] = int(file["vocab_size"])
    return typed_config(values)


def config_to_save(config: Config) -> dict[str, Any]:
    """Return what `saved_config` reads."""
    return {"config_version": VERSION, "config": config.model_dump(mode="json")}
