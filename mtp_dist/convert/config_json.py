"""Reading `config.json` of a Hugging Face folder."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtp_dist.convert.architectures.base import Architecture, ConfigKeys
from mtp_dist.convert.architectures.registry import ARCHITECTURES
from mtp_dist.convert.head_layout import model_type, plain_name
from mtp_dist.convert.json_file import read_json_object
from mtp_dist.errors import CheckpointError

EXPERT_KEYS = {"num_experts", "num_local_experts", "n_routed_experts"}
"""Keys of config.json with the number of experts."""


def read_config_json(source: Path) -> tuple[Architecture, ConfigKeys]:
    """Return the architecture of a folder's model and its keys in config.json.

    Raise CheckpointError if it is of another architecture, or has a part that mtp_dist does not support.
    """
    raw = read_json_object(source / "config.json", f"--from = '{source}'")
    architecture = _architecture(raw, source)
    keys = _validated(architecture.keys, raw, source)
    for key, why in keys.unsupported().items():
        if why:
            raise CheckpointError(f"--from = '{source}' has {key} = {getattr(keys, key)!r} in config.json: {why}")
    return architecture, keys


def _architecture(raw: dict[str, Any], source: Path) -> Architecture:
    architectures, given = raw.get("architectures") or [], raw.get("model_type")
    if not isinstance(architectures, list):
        raise CheckpointError(f"--from = '{source}' has architectures = {architectures!r} in config.json: not a list")
    name = str((architectures or [given or "no architecture"])[0])
    # Exports for transformers are plain models, whose further weights mtp_config.json explains.
    architecture = ARCHITECTURES.get(plain_name(name))
    if architecture is None:
        kind = ", a mixture of experts" if raw.keys() & EXPERT_KEYS else ""
        raise CheckpointError(f"--from = '{source}' has a {name}{kind}: only {_listed(ARCHITECTURES)} can be imported")
    expected = model_type(name)
    if given not in (None, expected):
        raise CheckpointError(
            f"--from = '{source}' has model_type = {given!r} in config.json, its architectures = [{name!r}] need "
            f"{expected!r}: make them agree"
        )
    return architecture


def _listed(names: dict[str, Any]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"


def _validated(keys: type[ConfigKeys], raw: dict[str, Any], source: Path) -> ConfigKeys:
    required = {key for key, field in keys.model_fields.items() if field.is_required()}
    if missing := sorted(key for key in required if raw.get(key) is None):
        raise CheckpointError(f"--from = '{source}': config.json lacks {', '.join(missing)}")
    try:
        return keys.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, message = first["loc"][0], first["msg"]
        raise CheckpointError(
            f"--from = '{source}' has {key} = {first['input']!r} in config.json: {message[0].lower()}{message[1:]}"
        ) from None
