"""Configurations saved in checkpoints and exports, with the keys of the version that wrote them.

To rename or remove a key, increment VERSION and add a function to MIGRATIONS that converts the old keys.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from mtp_dist.config.base import MAX_INTEGER
from mtp_dist.config.loader import typed_config
from mtp_dist.config.schema import Config
from mtp_dist.errors import ConfigError

VERSION = 2
"""Version of the keys in config/schema.py; a file without a version has version 1."""


def _from_version_1(values: dict[str, Any]) -> None:
    """Move the gradients' data type to its own key, and lower counts to today's limit."""
    given = values.get("deepspeed", {}).pop("communication_data_type", None)
    if given in ("bf16", "bfp16", "bfloat16") and values["train"]["precision"] == "bf16":
        values["parallel"]["grad_reduce_dtype"] = "bf16"
    for name, section in values.items():
        for key, value in section.items():
            # Such as a `checkpoint.every` of 10 billion, for never.
            if (name, key) != ("run", "seed") and isinstance(value, int) and value > MAX_INTEGER:
                section[key] = MAX_INTEGER


MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {1: _from_version_1}
"""Functions by version, which convert a configuration in place to the next version."""


def saved_config(file: Mapping[str, Any]) -> Config:
    """Return the configuration in the JSON of a checkpoint or export, which has `config` and `config_version`.

    The vocabulary size next to it replaces `model.vocab_size`. Incompatible settings are accepted, as they were when
    they were saved. Raise ConfigError if a newer version wrote it or a value is invalid, KeyError or
    TypeError if the JSON has no configuration.
    """
    version, values = int(file.get("config_version", 1)), deepcopy(file["config"])
    if version > VERSION:
        raise ConfigError(
            f"its configuration has version {version}, this mtp-dist reads up to version {VERSION}: install a newer one"
        )
    for number in range(version, VERSION):
        MIGRATIONS[number](values)
    values["model"]["vocab_size"] = int(file["vocab_size"])
    return typed_config(values)


def config_to_save(config: Config) -> dict[str, Any]:
    """Return the JSON that `saved_config` reads."""
    return {"config_version": VERSION, "config": config.model_dump(mode="json")}
